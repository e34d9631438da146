"""Records that pass between the parts.

Shapes: B batch, P prompt, R response, T = P + R, N response tokens that count, D width, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as fill

from ppo_core.masking import check_mask


@dataclass(frozen=True)
class ResponseTokens:
    """Tokens of responses, of however many rows, one after the other: N of them."""

    ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64: place in the response."""
    kept: Tensor | None
    """[N, K] as in `Sequences`."""

    def part(self, rows: slice) -> ResponseTokens:
        return ResponseTokens(self.ids[rows], self.positions[rows], None if self.kept is None else self.kept[rows])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Sequences:
    """Prompts padded on the left, responses on the right."""

    tokens: Tensor
    """[B, T] int64."""
    attention: Tensor
    """[B, T] bool, True where a token stands."""
    prompt_length: int
    """P: the responses begin here in every row."""
    kept: Tensor | None = None
    """[B, R, K] int64: the tokens among which each response token was sampled, filled up with -1; None: all."""

    @property
    def responses(self) -> Tensor:
        """[B, R] int64."""
        return self.tokens[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """[B, R] bool, True where a response token counts, EOS included."""
        return self.attention[:, self.prompt_length :]

    @property
    def counted(self) -> ResponseTokens:
        """The response tokens that count, row after row."""
        mask = self.mask
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return ResponseTokens(self.responses[mask], places[mask], None if self.kept is None else self.kept[mask])

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor | slice) -> Sequences:
        """Some of the rows, as wide as before."""
        kept = None if self.kept is None else self.kept[index]
        return replace(self, tokens=self.tokens[index], attention=self.attention[index], kept=kept)

    def extent(self) -> tuple[int, int]:
        """(first column with a token, longest response): what `cut` needs to drop the columns of padding alone."""
        check_mask(self.mask)
        first = int(self.attention.any(dim=0).int().argmax())
        return min(first, self.prompt_length - 1), max(int(self.mask.sum(dim=1).max()), 1)

    def cut(self, first: int, length: int) -> Sequences:
        """Columns from `first` on, responses up to `length`."""
        end = self.prompt_length + length
        kept = None if self.kept is None else self.kept[:, :length]
        return Sequences(self.tokens[:, first:end], self.attention[:, first:end], self.prompt_length - first, kept)


@dataclass(frozen=True)
class Samples:
    """What the sampler returns."""

    sequences: Sequences
    logprobs: Tensor
    """[B, R] float32 under the law that sampled; 0 where nothing counts."""
    ended: Tensor
    """[B] bool, True where the response ended by EOS, a stop token or a stop string and was not cut."""
    text_lengths: Tensor
    """[B] int64: response tokens that are text, that is all but a final EOS or stop token."""
    activations: Tensor | None = None
    """[B, T, D]: what the shared trunk said of the tokens while they were sampled, anything where none stands. None
    where there is no trunk."""

    def rows(self, index: Tensor | slice) -> Samples:
        """Some of the rows, without the columns that are padding in all of them."""
        sequences = self.sequences.rows(index)
        first, length = sequences.extent()
        activations = self.activations
        if activations is not None:
            activations = activations[index, first : sequences.prompt_length + length]
        return Samples(
            sequences.cut(first, length),
            self.logprobs[index, :length],
            self.ended[index],
            self.text_lengths[index],
            activations,
        )


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
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """[B] by name: what the parts of a combined reward say, before they are weighted. Empty for a single reward."""

    @property
    def mask(self) -> Tensor:
        return self.sequences.mask

    def __len__(self) -> int:
        return len(self.sequences)

    def rows(self, index: Tensor) -> Rollout:
        """Some of the rows, as wide as before."""
        parts = {name: scores[index] for name, scores in self.parts.items()}
        return Rollout(
            self.sequences.rows(index), **{name: t[index] for name, t in self._tensors().items()}, parts=parts
        )

    def cut(self, first: int, length: int) -> Rollout:
        """Columns from `first` on, responses up to `length`, as in `Sequences.cut`."""
        tensors = {name: t[:, :length] if t.dim() == 2 else t for name, t in self._tensors().items()}
        tensors["activations"] = self.activations[:, first : self.sequences.prompt_length + length]
        return Rollout(self.sequences.cut(first, length), **tensors, parts=self.parts)

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sequences", "parts")}

    @staticmethod
    def put_together(whole: Sequences, parts: Sequence[Rollout], order: Tensor) -> Rollout:
        """The rollout of `whole` from cut parts, whose rows are those of `whole` in `order` [B]."""
        back = order.argsort()

        def column(name: str) -> Tensor:
            return torch.cat([_widen(getattr(part, name), name, part.sequences, whole) for part in parts])[back]

        names = [f.name for f in fields(Rollout) if f.name not in ("sequences", "parts")]
        by_name = {name: torch.cat([part.parts[name] for part in parts])[back] for name in parts[0].parts}
        return Rollout(whole, **{name: column(name) for name in names}, parts=by_name)


@dataclass(frozen=True)
class Experience:
    """A rollout with its learning targets, all [B, R]. Fixed for all epochs."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        """Some of the rows, without the columns that are padding in all of them."""
        rollout = self.rollout.rows(index)
        first, length = rollout.sequences.extent()
        return Experience(rollout.cut(first, length), self.advantages[index, :length], self.returns[index, :length])


def _widen(tensor: Tensor, name: str, part: Sequences, whole: Sequences) -> Tensor:
    """A part's tensor with zeros in the columns that its cut left out."""
    right = whole.responses.shape[1] - part.responses.shape[1]
    if name == "activations":
        left = whole.prompt_length - part.prompt_length
        return fill(tensor, (*(0, 0) * (tensor.dim() - 2), left, right))
    return fill(tensor, (0, right)) if tensor.dim() == 2 else tensor


def pad_prompts(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, P] padded on the left, and where tokens stand [B, P], both on `device`."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = True
    return tokens.to(device), attention.to(device)
