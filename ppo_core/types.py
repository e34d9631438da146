"""Records that pass between the parts. Shapes: B batch, P prompt, R response, T = P + R, D width."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Prompts padded on the left, responses on the right."""

    tokens: Tensor
    """[B, T] int64."""
    attention: Tensor
    """[B, T] bool, True where a token stands."""
    prompt_length: int
    """P: the responses begin here in every row."""

    @property
    def responses(self) -> Tensor:
        """[B, R] int64."""
        return self.tokens[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """[B, R] bool, True where a response token counts, EOS included."""
        return self.attention[:, self.prompt_length :]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor | slice) -> Sequences:
        return Sequences(self.tokens[index], self.attention[index], self.prompt_length)


@dataclass(frozen=True)
class Samples:
    """What the sampler returns."""

    sequences: Sequences
    logprobs: Tensor
    """[B, R] float32 under the law that sampled; 0 where nothing counts."""
    ended: Tensor
    """[B] bool, True where the response ended by EOS and was not cut."""

    def rows(self, index: Tensor | slice) -> Samples:
        return Samples(self.sequences.rows(index), self.logprobs[index], self.ended[index])


@dataclass(frozen=True)
class Rollout:
    """Responses and all that was known when they were sampled. Nothing in it changes during the update."""

    sequences: Sequences
    activations: Tensor
    """[B, T, D] output of the shared trunk, or token ids [B, T] where there is none."""
    logprobs: Tensor
    """[B, R] of the policy that sampled."""
    ref_logprobs: Tensor
    """[B, R]"""
    values: Tensor
    """[B, R]: the value before token t."""
    entropy: Tensor
    """[B, R] nats."""
    scores: Tensor
    """[B]"""
    ended: Tensor
    """[B] bool"""

    @property
    def mask(self) -> Tensor:
        return self.sequences.mask

    def rows(self, index: Tensor) -> Rollout:
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        sequences: Sequences = parts.pop("sequences")
        return Rollout(sequences.rows(index), **{name: tensor[index] for name, tensor in parts.items()})


def pad_prompts(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] padded on the left, and where tokens stand [B, P]."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = True
    return tokens, attention
