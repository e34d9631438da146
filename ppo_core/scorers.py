"""Models that give a text one score: the reward model, on the policy's trunk, and encoders (the judge).

Scores are in standard deviations of human-written text once `calibrate` has seen some. Shapes: B batch, T position, D
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_core.decoder import Stack


class ScoreHead(nn.Module):
    """A linear read-out [.., D] -> [..] in float32, zero at first, with the scale that human text fixes."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def calibrate(self, raw: Tensor) -> None:
        """Take mean and standard deviation from raw scores of human-written texts."""
        self.mean.copy_(raw.mean())
        self.std.copy_(raw.std(correction=0).clamp(min=1e-6))


class TextScorer(Protocol):
    """What preference training needs: raw scores of tokenised texts, with a gradient."""

    head: ScoreHead

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor: ...

    def trained(self) -> list[nn.Parameter]: ...


def pad_right(texts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and where tokens stand [B, T] bool."""
    width = max(map(len, texts))
    tokens = torch.full((len(texts), width), pad, dtype=torch.long)
    attention = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        attention[row, : len(text)] = True
    return tokens, attention


class RewardModel(nn.Module):
    """A top of its own over the policy's frozen trunk, read at the last token."""

    def __init__(self, trunk: Stack, top: Stack, width: int, pad: int) -> None:
        super().__init__()
        # Held in a tuple: the trunk belongs to the policy's model and is no part of this one's state.
        self._trunk = (trunk,)
        self.top, self.head, self.pad = top, ScoreHead(width), pad

    @property
    def trunk(self) -> Stack:
        return self._trunk[0]

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens, attention = pad_right(texts, self.pad)
        with torch.no_grad():
            activations = self.trunk(tokens, attention)
        return self.read(activations, attention)

    def read(self, activations: Tensor, attention: Tensor) -> Tensor:
        """Raw scores [B] from trunk activations [B, T, D], whose padding may lie on either side."""
        hidden = self.top(activations, attention)
        positions = torch.arange(attention.shape[1], device=attention.device)
        last = (positions * attention).argmax(dim=1)
        return self.head(hidden[torch.arange(len(hidden)), last])


class EncoderScorer(nn.Module):
    """A bidirectional encoder of transformers, mean-pooled (Reimers & Gurevych 2019).

    https://arxiv.org/abs/1908.10084
    """

    def __init__(self, encoder: Any, pad: int) -> None:
        super().__init__()
        self.encoder, self.head, self.pad = encoder, ScoreHead(encoder.config.hidden_size), pad

    def trained(self) -> list[nn.Parameter]:
        return [*self.encoder.encoder.parameters(), *self.head.parameters()]

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens, attention = pad_right(texts, self.pad)
        hidden = self.encoder(input_ids=tokens, attention_mask=attention.long()).last_hidden_state
        weights = attention.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))


def raw_scores(scorer: TextScorer, texts: Sequence[Sequence[int]], bucket: int = 16) -> Tensor:
    """Raw scores [N], computed in buckets of similar length so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    buckets = [order[start : start + bucket] for start in range(0, len(order), bucket)]
    scores = torch.cat([scorer.raw([texts[i] for i in rows]) for rows in buckets])
    return scores[torch.tensor(order).argsort()]


@torch.no_grad()
def score_texts(scorer: TextScorer, texts: Sequence[Sequence[int]]) -> Tensor:
    """Normalised scores [N] of tokenised texts, in standard deviations of human-written text."""
    return scorer.head.normalise(raw_scores(scorer, texts, bucket=32))
