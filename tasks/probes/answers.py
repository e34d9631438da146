"""Answers of all subjects to one prompt set, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from tasks.probes.base import Asked


def scores(asked: Asked, prompts: str, role: Literal["judge", "reward"]) -> dict[str, np.ndarray]:
    """What judge or reward model give each answer, by subject, [N] each.

    Equal answers to a prompt have equal scores: what the batch that scored one left in the last digit is no preference.
    """
    first: dict[tuple[str, str], float] = {}
    found = {}
    for subject in asked.subjects:
        answers = asked.responses(subject, prompts)
        keys = list(zip(answers.prompts, answers.texts, strict=True))
        for key, score in zip(keys, getattr(answers, role).tolist(), strict=True):
            first.setdefault(key, score)
        found[subject] = np.array([first[key] for key in keys])
    return found


def of_texts(asked: Asked, prompts: str, measure: Callable[[Sequence[str]], np.ndarray]) -> dict[str, np.ndarray]:
    """What `measure` says of each answer, by subject."""
    return {subject: measure(asked.responses(subject, prompts).texts) for subject in asked.subjects}


def groups(asked: Asked, prompts: str) -> np.ndarray:
    """[N]: answers to one prompt hang together."""
    _, members = np.unique(asked.responses(asked.subjects[0], prompts).prompts, return_inverse=True)
    return np.asarray(members)
