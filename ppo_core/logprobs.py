"""Log-probabilities and entropies of tokens under the law that sampled them.

Shapes: B batch, R response position, V vocabulary; [B, R] may be [N], any tokens. `logits[:, t]` predicts
`tokens[:, t]`: the shift by one happens where the hidden states are sliced (`models`), once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOG_ZERO = -1e30
"""Stands for the logarithm of 0 where it is multiplied by a probability of 0: with -inf that would be NaN."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, [B, R] float32, from logits [B, R, V] and tokens [B, R]."""
    return _pick(_log_law(logits, temperature), tokens)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the law at each position in nats, [B, R] float32.

    Tokens that cannot be sampled (logit -inf) add nothing, and no NaN.
    """
    return logprobs_and_entropy(logits, logits.argmax(dim=-1), temperature)[1]


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both of the above from one softmax."""
    logprobs, entropy = _LogprobsAndEntropy.apply(logits, tokens, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _LogprobsAndEntropy(torch.autograd.Function):
    """One tensor of the vocabulary's width is kept for the backward pass, and few are made.

    With l = log softmax(z / T), p = exp(l) and H = -sum p l: d l_y / d z_j = (1[j = y] - p_j) / T and
    d H / d z_j = -p_j (l_j + H) / T.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        law = _log_law(logits, temperature)
        logprobs = _pick(law, tokens)
        probabilities = law.exp()
        law.clamp_(min=_LOG_ZERO)
        # A batch of dot products makes no tensor of products.
        entropy = -(probabilities.unsqueeze(-2) @ law.unsqueeze(-1)).squeeze(-1).squeeze(-1)
        ctx.save_for_backward(law, entropy, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        law, entropy, tokens = ctx.saved_tensors
        of_logprob, of_entropy = (grad / ctx.temperature for grad in grads)
        constant = -(of_logprob + of_entropy * entropy)
        grad = law.mul(-of_entropy.unsqueeze(-1)).add_(constant.unsqueeze(-1)).mul_(law.exp())
        grad.scatter_add_(-1, tokens.unsqueeze(-1), of_logprob.unsqueeze(-1))
        return grad.to(ctx.dtype), None, None


def _log_law(logits: Tensor, temperature: float) -> Tensor:
    # log_softmax, not logits - logsumexp: on CPU torch vectorises the first and not the second (12 times slower).
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


def _pick(law: Tensor, tokens: Tensor) -> Tensor:
    return law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
