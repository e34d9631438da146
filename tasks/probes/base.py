"""What a probe is: a function that asks models and returns numbers, one an item. All statistics are made elsewhere.

A probe may not choose an interval, a test or a default: it says what was measured for each item and each subject, and
what could not be measured, with the reason. Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from tasks.models.responses import Responses
    from tasks.params import Params
    from tasks.workspace import Workspace

POLICY, REFERENCE, CHAMPION = "policy", "reference", "champion"
"""The subjects: the aligned model, the model it started from, and the approved model in service if there is one."""
TEST = "test"
"""The prompt set of the profile itself: the split `test` of its prompts."""


class Missing(Exception):
    """Data that a probe needs is not there; the text says why and how it could be had."""


@dataclass(frozen=True)
class Figure:
    """One number an item (a prompt, a text, a question) for every subject that was asked."""

    key: str
    """AXIS.NAME: metrics carry it as the mean of the policy, and more under KEY_reference, KEY_difference, ..."""
    name: str
    meaning: str
    """For a reader who does not know the figure: what is counted, and which way is good."""
    better: Literal["higher", "lower", "same"]
    """`same`: any change is a cost, whichever way."""
    values: Mapping[str, np.ndarray]
    """By subject, [N] each: the same items in the same order, so that differences are paired."""
    groups: np.ndarray | None = None
    """[N] labels of items that hang together (answers to one prompt): they are drawn and exchanged together."""
    wins: bool = False
    """Whether to say in which share of the items the policy is higher than the other subject, too; ties half."""
    unit: str = ""
    """`share` (of items, shown in per cent), `sd`, `nats`, `tokens`, ...: what a value is measured in."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """What something simple reaches, by its name: {"the longer answer": 0.62}."""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    """What else must be known to read the figure, as {"classifier_accuracy": 0.91}; metrics carry it as KEY.FACT."""


@dataclass(frozen=True)
class NotMeasured:
    """A figure that could not be had. Every output says so; no default stands in for it."""

    key: str
    name: str
    reason: str


@dataclass(frozen=True)
class Continuation:
    """A text whose log-probability is asked for, and what it follows."""

    prompt: str
    format: Literal["text", "chat"]
    """As in data/canonical/prompts.parquet: plain text, or a JSON array of turns that the assistant replies to."""
    text: str


class Asked(Protocol):
    """What a probe may use. Nothing is computed twice: answers are kept, texts of one call share batches."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """POLICY, REFERENCE and, where there is one of the same shape, CHAMPION."""

    @property
    def prompt_sets(self) -> tuple[str, ...]:
        """TEST, and the prompt sets of `ingest.probes` on which a helpful answer is wanted (`kind: prompts`)."""

    @property
    def cycles(self) -> pd.DataFrame:
        """plots/cycles.csv: the dev prompts after each cycle of the training."""

    @property
    def params(self) -> Params: ...

    @property
    def workspace(self) -> Workspace: ...

    def responses(self, subject: str, prompts: str) -> Responses:
        """Answers to TEST or to the rows (`prompt`, `format`) of data/probes/PROMPTS.parquet, scored.

        Every subject samples with the same seeds. With `evaluate.seeds` over 1 the prompts stand there once a seed;
        `Responses.prompts` names them, and is what to group by. Raises Missing where there is no such set.
        """

    def logprobs(self, subject: str, texts: Sequence[Continuation]) -> list[np.ndarray]:
        """Log-probability (nats) of each token of each continuation, without EOS, at temperature 1: [tokens] each.

        A text that is longer than the model's context raises DataError.
        """

    def items(self, name: str) -> pd.DataFrame:
        """data/probes/NAME.parquet. Raises Missing where the profile names no such data."""


class Probe(Protocol):
    """Measures one axis. May raise Missing: then all of its axis is not measured, for that reason."""

    def __call__(self, asked: Asked) -> list[Figure | NotMeasured]: ...
