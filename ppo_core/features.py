"""From hidden states to the law of each token, a chunk of tokens at a time: logits of all are never held.

Shapes: B batch, R response, N response tokens that count, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_core.decoder import LMHead
from ppo_core.law import SamplingLaw
from ppo_core.logprobs import logprobs_and_entropy, token_logprobs
from ppo_core.types import ResponseTokens

CHUNK = 256
"""Tokens whose logits are computed at once: many enough for fast products, few enough that any vocabulary fits."""


@dataclass(frozen=True)
class Features:
    """What the networks make of the positions that predict and value the response tokens, row after row."""

    policy: Tensor
    """[N, D]"""
    critic: Tensor
    """[N, D]; the very same tensor where the critic is shared."""

    def part(self, rows: slice) -> Features:
        return Features(self.policy[rows], self.critic[rows])

    def detached(self) -> Features:
        """Leaves of a graph of their own, which collect the gradient of what is made from them."""
        policy = self.policy.detach().requires_grad_()
        shared = self.critic is self.policy
        return Features(policy, policy if shared else self.critic.detach().requires_grad_())

    def backward(self, leaves: Features) -> None:
        """Go on where the backward passes of `leaves` ended."""
        pairs = [(self.policy, leaves.policy)] + ([] if self.critic is self.policy else [(self.critic, leaves.critic)])
        ends, grads = zip(*((end, leaf.grad) for end, leaf in pairs if leaf.grad is not None), strict=True)
        torch.autograd.backward(ends, grads)


def law_of_tokens(head: LMHead, hidden: Tensor, tokens: ResponseTokens, law: SamplingLaw) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [N] of each token from the hidden states [N, D] that predict it.

    Without a gradient, the logits of a chunk at a time are all that is held.
    """
    found = [logprobs_and_entropy(logits, ids, law.temperature) for logits, ids in _chunked(head, hidden, tokens, law)]
    logprobs, entropy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def logprobs_of_tokens(head: LMHead, hidden: Tensor, tokens: ResponseTokens, law: SamplingLaw) -> Tensor:
    """The first of the above, for less."""
    return torch.cat(
        [token_logprobs(logits, ids, law.temperature) for logits, ids in _chunked(head, hidden, tokens, law)]
    )


def _chunked(head: LMHead, hidden: Tensor, tokens: ResponseTokens, law: SamplingLaw) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in chunks(len(tokens)):
        part = tokens.part(rows)
        yield law.restricted(head(hidden[rows]), part), part.ids


def chunks(n: int) -> list[slice]:
    """Slices of `CHUNK` tokens; one, of nothing, if there are none."""
    return [slice(start, start + CHUNK) for start in range(0, max(n, 1), CHUNK)]


def in_place(found: Tensor, mask: Tensor) -> Tensor:
    """[N] numbers of the tokens that count as [B, R], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)
