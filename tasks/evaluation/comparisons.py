"""Subjects compared on the same items: intervals, and how often chance alone would part them as far. Pure numpy.

N items, G groups of items that hang together. docs/evaluation.md says what each number means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tasks.errors import TrainingHealthError
from tasks.probes.base import CHAMPION, POLICY, REFERENCE, Figure
from tasks.statistics import Interval, bootstrap_mean, group_sums, wins

EXACT = 12
"""Up to so many groups that differ, all sign flips are tried; beyond, as many random ones as there are resamples."""
SIGNIFICANT = 0.05
BROKEN_MODEL = "a model in models/ is broken: run the stage that made it again"


@dataclass(frozen=True)
class Comparison:
    """The policy against another subject, item by item."""

    difference: Interval
    """Policy minus other."""
    p: float
    """Two-sided, of `sign_flip`."""
    wins: Interval | None
    """Share of the items where the policy is higher, ties half; None where the figure does not ask for it."""

    def worse(self, better: str) -> bool:
        """Whether the policy is worse, and chance does not explain it. Where `better` is `same`, any change is."""
        value = self.difference.value
        bad = value != 0 if better == "same" else value < 0 if better == "higher" else value > 0
        return bad and self.p < SIGNIFICANT


@dataclass(frozen=True)
class Result:
    """A figure with what is known about its error."""

    figure: Figure
    means: Mapping[str, Interval]
    """By subject."""
    against: Mapping[str, Comparison]
    """By the other subject."""


def judged(figure: Figure, resamples: int, seed: int) -> Result:
    """Intervals of all subjects and the policy's comparison with each other one.

    Raises ValueError where the subjects were not asked the same items, TrainingHealthError where a value is not finite.
    """
    values = {subject: np.asarray(x, dtype=np.float64) for subject, x in figure.values.items()}
    if len({len(x) for x in values.values()}) != 1 or POLICY not in values:
        raise ValueError(f"{figure.key}: the subjects have {[len(x) for x in values.values()]} items")
    if broken := [subject for subject, x in values.items() if not np.isfinite(x).all()]:
        raise TrainingHealthError(f"is not finite for {', '.join(broken)}", figure.key, BROKEN_MODEL)
    means = {subject: bootstrap_mean(x, resamples, seed, figure.groups) for subject, x in values.items()}
    others = [subject for subject in (REFERENCE, CHAMPION) if subject in values]
    against = {other: _compared(values[POLICY], values[other], figure, resamples, seed) for other in others}
    return Result(figure, means, against)


def _compared(policy: np.ndarray, other: np.ndarray, figure: Figure, resamples: int, seed: int) -> Comparison:
    return Comparison(
        bootstrap_mean(policy - other, resamples, seed, figure.groups),
        sign_flip(policy - other, resamples, seed, figure.groups),
        bootstrap_mean(wins(policy, other), resamples, seed, figure.groups) if figure.wins else None,
    )


def sign_flip(differences: np.ndarray, draws: int, seed: int, groups: np.ndarray | None = None) -> float:
    """The p value of paired differences [N] by Fisher's (1935) permutation test, two-sided.

    If the two subjects were the same, each item's difference could as well have the other sign; items of a group change
    together. p is the share of sign patterns whose mean lies at least as far from 0. With few groups all patterns are
    tried, else `draws` random ones, the observed pattern counting among them (Phipson and Smyth 2010), so that p is
    never 0. No law of the differences is assumed; ties (differences of 0) weigh nothing, and if there is nothing else,
    p is 1.
    """
    (sums,), _ = group_sums(np.asarray(differences, dtype=np.float64)[None], groups)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    # Sums of the same numbers in another order may differ in the last digit.
    reached = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= EXACT:
        return float(np.mean([abs(np.dot(signs, sums)) >= reached for signs in product((-1, 1), repeat=len(sums))]))
    draw = np.random.default_rng(seed)
    further = sum(abs(np.dot(draw.integers(2, size=len(sums)) * 2 - 1, sums)) >= reached for _ in range(draws))
    return float((1 + further) / (1 + draws))


def as_metrics(results: Sequence[Result]) -> dict[str, float | int | str]:
    """Flat, for metrics/evaluate.json: KEY is the policy's mean, `_reference` and `_champion` that of the others.

    Each mean has `_low` and `_high`; `_n` counts items. KEY_difference (policy minus reference) and
    KEY_champion_difference have these and `_p`; KEY_wins and KEY_champion_wins where the figure asks for them.
    """
    found: dict[str, float | int | str] = {}
    for result in results:
        key = result.figure.key
        for subject, mean in result.means.items():
            found |= bounds(key if subject == POLICY else f"{key}_{subject}", mean)
        found[f"{key}_n"] = result.means[POLICY].n
        for other, comparison in result.against.items():
            prefix = key if other == REFERENCE else f"{key}_{other}"
            found |= bounds(f"{prefix}_difference", comparison.difference) | {f"{prefix}_difference_p": comparison.p}
            if comparison.wins:
                found |= bounds(f"{prefix}_wins", comparison.wins)
        found |= {f"{key}.{name}": value for name, value in {**result.figure.baselines, **result.figure.facts}.items()}
    return found


def bounds(name: str, interval: Interval) -> dict[str, float]:
    """The interval as NAME, NAME_low and NAME_high."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
