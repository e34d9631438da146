"""From hidden states to the law of each token, a chunk of tokens at a time: logits of all are never held.

Shapes: B batch, R response, N response tokens that count, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ppo_core.decoder import LMHead
from ppo_core.law import SamplingLaw
from ppo_core.logprobs import logprobs_and_entropy, token_logprobs
from ppo_core.types import ResponseTokens

CHUNK, GPU_CHUNK = 256, 2048
"""Tokens whose logits are computed at once: many enough for fast products, few enough that they fit."""


def above(features: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Pieces of `features` [N, D] and where they lie, for losses whose backward passes run before the next piece comes.

    What the output layer makes of a piece is then gone. What lies below goes backward at the end, once.
    """
    leaf = features.detach().requires_grad_()
    for rows in chunks(features):
        yield leaf[rows], rows
    if features.requires_grad:
        features.backward(leaf.grad)


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
    for rows in chunks(hidden):
        part = tokens.part(rows)
        yield law.restricted(head(hidden[rows]), part), part.ids


def chunks(hidden: Tensor) -> list[slice]:
    """Slices of hidden states [N, D], so many tokens each; one, of nothing, if there are none."""
    size = GPU_CHUNK if hidden.is_cuda else CHUNK
    return [slice(start, start + size) for start in range(0, max(len(hidden), 1), size)]


def in_place(found: Tensor, mask: Tensor) -> Tensor:
    """[N] numbers of the tokens that count as [B, R], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)
