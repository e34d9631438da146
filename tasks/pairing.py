"""From ratings to preference pairs with soft labels."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tasks.formats import RatedText


class RatedPair(NamedTuple):
    """Two texts of one group, the one rated higher first."""

    chosen: RatedText
    rejected: RatedText
    margin: float
    """Gap between the mean ratings."""
    target: float
    """See `preference_share`."""


def preference_share(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of rater pairs, one of each text, who rated `chosen` higher; a tie counts half.

    The probability of superiority (Vargha and Delaney 2000, equation 1), which is the soft label of the pair.
    """
    difference = np.subtract.outer(np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float))
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def rated_groups(
    texts: Sequence[RatedText], group_size: int, min_gap: float, draw: random.Random
) -> Iterator[list[RatedPair]]:
    """Shuffle the texts into groups of `group_size`, and compare all texts of a group with each other.

    Yields, group by group, the pairs whose mean ratings differ, and by `min_gap` at least: training can then read once
    what several pairs share (Ouyang et al. 2022, section 3.5). The last group may be smaller.
    """
    shuffled = draw.sample(texts, len(texts))
    for start in range(0, len(shuffled), group_size):
        ranked = sorted(shuffled[start : start + group_size], key=lambda text: text.mean, reverse=True)
        compared = [_compare(higher, lower) for higher, lower in combinations(ranked, 2)]
        yield [pair for pair in compared if pair.margin > 0 and pair.margin >= min_gap]


def _compare(higher: RatedText, lower: RatedText) -> RatedPair:
    return RatedPair(higher, lower, higher.mean - lower.mean, preference_share(higher.ratings, lower.ratings))
