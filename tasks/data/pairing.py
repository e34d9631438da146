"""From ratings to preference pairs with soft labels."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tasks.data.formats import RatedText

_STEP = 0.5
"""Width of a bin of log length ratios: by a factor of 1.65."""


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


def prompt_pairs(replies: Sequence[RatedText], min_gap: float) -> Iterator[list[RatedPair]]:
    """All replies to one prompt compared with each other; pairs whose mean scores differ, and by `min_gap` at least.

    Yields together the pairs of one preferred reply.
    """
    ranked = sorted(replies, key=lambda reply: reply.mean, reverse=True)
    for i, higher in enumerate(ranked):
        compared = [_compare(higher, lower) for lower in ranked[i + 1 :]]
        if wide := [pair for pair in compared if pair.margin > 0 and pair.margin >= min_gap]:
            yield wide


def length_balance(ratios: Sequence[float], draw: random.Random) -> list[int]:
    """Which pairs to keep, so that length teaches nothing; `ratios` are chosen over rejected length, one a pair.

    Of the direction (longer wins, shorter wins) that has more, pairs are left out at random, within each bin of ratios
    that are alike (`_STEP`): then neither the longer nor the much longer reply is more likely to be the better one.
    Pairs of one length stay.
    """
    logs = [math.log(ratio) for ratio in ratios]
    sides: defaultdict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, log in enumerate(logs):
        sides[math.ceil(abs(log) / _STEP)][log > 0].append(i)
    kept = sides.pop(0, ([], []))[0]
    for shorter, longer in sides.values():
        n = min(len(shorter), len(longer))
        kept += [*draw.sample(shorter, n), *draw.sample(longer, n)]
    return sorted(kept)


def _compare(higher: RatedText, lower: RatedText) -> RatedPair:
    return RatedPair(higher, lower, higher.mean - lower.mean, preference_share(higher.ratings, lower.ratings))
