"""Models that give a text one score: the reward model, on the policy's trunk, encoders (the judge), ready-made ones.

Scores are in standard deviations of human-written text once `calibrate` has seen some. Shapes: B batch, T position, D
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_core.decoder import Stack

BUCKET = 32
"""Texts read at once."""


class Scale(nn.Module):
    """Mean and standard deviation that raw scores are measured in: those of human text."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def calibrate(self, raw: Tensor) -> None:
        """Take mean and standard deviation from raw scores of human-written texts."""
        self.mean.copy_(raw.mean())
        self.std.copy_(raw.std(correction=0).clamp(min=1e-6))


class ReadOut(nn.Module):
    """A linear read-out [.., D] -> [..] in float32, zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)


class ScoreHead(ReadOut, Scale):
    """A read-out with its scale."""


class Scorer(Protocol):
    """Raw scores [N] of tokenised texts, and the scale that they are brought to."""

    @property
    def head(self) -> Scale: ...

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor: ...


class TextScorer(Scorer, Protocol):
    """What preference training needs: raw scores with a gradient, and the weights that it moves."""

    def trained(self) -> list[nn.Parameter]: ...


def pad_right(texts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and where tokens stand [B, T] bool, both on `device`."""
    width = max(map(len, texts))
    tokens = torch.full((len(texts), width), pad, dtype=torch.long)
    attention = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        attention[row, : len(text)] = True
    return tokens.to(device), attention.to(device)


class RewardModel(nn.Module):
    """A top of its own over the policy's frozen trunk, read at the last token."""

    def __init__(self, trunk: Stack, top: Stack, width: int, pad: int) -> None:
        super().__init__()
        # Held in a tuple: the trunk belongs to the policy's model and is no part of this one's state.
        self._trunk = (trunk,)
        self.top, self.pad = top, pad
        self.head = ScoreHead(width).to(next(top.parameters()).device)

    @property
    def trunk(self) -> Stack:
        return self._trunk[0]

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens, attention = pad_right(texts, self.pad, self.head.mean.device)
        with torch.no_grad():
            activations = self.trunk(tokens, attention)
        return self.read(activations, attention)

    def read(self, activations: Tensor, attention: Tensor) -> Tensor:
        """Raw scores [B] from trunk activations [B, T, D], whose padding may lie on either side."""
        hidden = self.top(activations, attention)
        positions = torch.arange(attention.shape[1], device=attention.device)
        last = (positions * attention).argmax(dim=1)
        return self.head(hidden[torch.arange(len(hidden), device=last.device), last])


class EncoderScorer(nn.Module):
    """A bidirectional encoder of transformers, mean-pooled (Reimers & Gurevych 2019).

    https://arxiv.org/abs/1908.10084
    """

    def __init__(self, encoder: Any, pad: int) -> None:
        super().__init__()
        self.encoder, self.pad = encoder, pad
        self.head = ScoreHead(encoder.config.hidden_size).to(encoder.device)

    def trained(self) -> list[nn.Parameter]:
        return [*self.encoder.encoder.parameters(), *self.head.parameters()]

    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor:
        return self.head(self.embed(texts))

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What the head reads of each text, [B, D]."""
        tokens, attention = pad_right(texts, self.pad, self.encoder.device)
        hidden = self.encoder(input_ids=tokens, attention_mask=attention.long()).last_hidden_state
        weights = attention.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class ReadyScorer(nn.Module):
    """A ready-made reward model: a sequence classifier of transformers with one label. Only its scale is state."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        # Held in a tuple: its weights lie elsewhere, and are no part of this one's state.
        self._classifier = (classifier,)
        self.head = Scale().to(classifier.device)

    @property
    def classifier(self) -> Any:
        return self._classifier[0]

    @torch.no_grad()
    def raw(self, texts: Sequence[Sequence[int]]) -> Tensor:
        pad, device = self.classifier.config.get_text_config().pad_token_id, self.classifier.device
        # Where there is no padding token, transformers reads the last place of a row, whatever stands there.
        batches = [pad_right([text], 0, device) for text in texts] if pad is None else [pad_right(texts, pad, device)]
        logits = [self.classifier(input_ids=ids, attention_mask=there.long()).logits for ids, there in batches]
        return torch.cat(logits).squeeze(-1).float()


def raw_scores(scorer: Scorer, texts: Sequence[Sequence[int]]) -> Tensor:
    """Raw scores [N]."""
    return in_buckets(scorer.raw, texts)


def in_buckets(read: Callable[[list[Sequence[int]]], Tensor], texts: Sequence[Sequence[int]]) -> Tensor:
    """What `read` says of each text [N, ..], asked in buckets of similar length so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    buckets = [order[start : start + BUCKET] for start in range(0, len(order), BUCKET)]
    found = torch.cat([read([texts[i] for i in rows]) for rows in buckets])
    return found[torch.tensor(order, device=found.device).argsort()]


@torch.no_grad()
def score_texts(scorer: Scorer, texts: Sequence[Sequence[int]]) -> Tensor:
    """Normalised scores [N] of tokenised texts, in standard deviations of human-written text."""
    return scorer.head.normalise(raw_scores(scorer, texts))
