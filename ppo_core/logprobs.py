"""Log-probabilities and entropies of tokens under the law that sampled them.

Shapes: B batch, R response position, V vocabulary. `logits[:, t]` predicts `tokens[:, t]`: the shift by one happens
where the hidden states are sliced (`models`), once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, [B, R] float32, from logits [B, R, V] and tokens [B, R]."""
    return _pick(_log_law(logits, temperature), tokens)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the law at each position in nats, [B, R] float32.

    Tokens that cannot be sampled (logit -inf) add nothing, and no NaN.
    """
    return _entropy(_log_law(logits, temperature))


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both of the above from one softmax."""
    law = _log_law(logits, temperature)
    return _pick(law, tokens), _entropy(law)


def _log_law(logits: Tensor, temperature: float) -> Tensor:
    # log_softmax, not logits - logsumexp: on CPU torch vectorises the first and not the second (12 times slower).
    return (logits.float() / temperature).log_softmax(dim=-1)


def _pick(law: Tensor, tokens: Tensor) -> Tensor:
    return law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _entropy(law: Tensor) -> Tensor:
    # 0 x -inf is NaN, in the value and in the gradient; what has no probability must not enter the product.
    finite = torch.where(law.isneginf(), torch.zeros((), dtype=law.dtype, device=law.device), law)
    return -(law.exp() * finite).sum(dim=-1)
