"""Helpful: whose answers the judge prefers, on every prompt set of the profile."""

from __future__ import annotations

from tasks.probes.answers import groups, scores
from tasks.probes.base import TEST, Asked, Figure, NotMeasured

_MEANING = (
    "The judge's score of an answer. It reads each answer by itself, so that which of two comes first cannot matter; "
    "its win rate is the share of prompts where the policy's answer scores higher, a tie counting half."
)


def measure(asked: Asked) -> list[Figure | NotMeasured]:
    """The judge's scores on each prompt set: `helpful.judge` on the test prompts, `helpful.judge_NAME` on others."""
    return [
        Figure(
            key="helpful.judge" if prompts == TEST else f"helpful.judge_{prompts}",
            name=f"judge's score, {prompts} prompts",
            meaning=_MEANING,
            better="higher",
            values=scores(asked, prompts, "judge"),
            groups=groups(asked, prompts),
            wins=True,
            unit="sd",
        )
        for prompts in asked.prompt_sets
    ]
