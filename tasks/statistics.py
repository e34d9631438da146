"""Figures of an evaluation, with what is known about their error. Pure numpy.

N = prompts (or pairs); every array is [N]. Intervals hold at 95 %. docs/evaluation.md says why each figure is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # it brings torch, which nothing here needs
    from tasks.models.responses import Responses

Z = 1.959963984540054
"""The normal law's 97.5 % quantile."""
TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A figure from `n` cases and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_means(
    columns: np.ndarray,
    resamples: int,
    seed: int,
    groups: np.ndarray | None = None,
    statistic: Callable[[np.ndarray], float] = lambda means: float(means[0]),
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a `statistic` of the means [C] of `columns` [C, N].

    Cases are drawn with replacement, each with all of its columns, which is what pairs them. `groups` [N] names cases
    that hang together (answers to one prompt): whole groups are drawn then.
    """
    columns = np.asarray(columns, dtype=np.float64)
    n = columns.shape[1]
    if n == 0:
        raise ValueError("an interval needs at least one case")
    sums, sizes = group_sums(columns, groups)
    draw = np.random.default_rng(seed)
    drawn = [draw.integers(len(sizes), size=len(sizes)) for _ in range(resamples)]
    found = [statistic(sums[:, rows].sum(axis=1) / sizes[rows].sum()) for rows in drawn]
    low, high = np.percentile(found, TAILS)
    return Interval(statistic(columns.mean(axis=1)), float(low), float(high), n)


def group_sums(columns: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [C, G] of `columns` [C, N] by group and the groups' sizes [G]; without `groups` each case is its own."""
    if groups is None:
        return columns, np.ones(columns.shape[1])
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    return np.stack([np.bincount(members, weights=column) for column in columns]), np.bincount(members).astype(float)


def bootstrap_mean(x: np.ndarray, resamples: int, seed: int, groups: np.ndarray | None = None) -> Interval:
    """The mean of `x`; of paired differences, the mean gain."""
    return bootstrap_means(np.asarray(x)[None], resamples, seed, groups)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where `a` is higher, 0 where `b` is, 0.5 where they tie."""
    signs: np.ndarray = np.sign(np.subtract(a, b, dtype=np.float64))
    return (signs + 1) / 2


def score_differences(policy: Responses, reference: Responses, role: Literal["judge", "reward"]) -> np.ndarray:
    """What judge or reward model give the policy's answer minus what they give the reference's, per prompt.

    Equal texts differ by exactly 0: what the batch that scored them left in the last digit is no preference.
    """
    same = np.array(policy.texts, dtype=object) == np.array(reference.texts, dtype=object)
    difference: np.ndarray = np.subtract(getattr(policy, role), getattr(reference, role), dtype=np.float64)
    return np.where(same, 0.0, difference)


def part_gains(policy: Responses, reference: Responses) -> dict[str, np.ndarray]:
    """What the parts of a combined reward gained, by name, per prompt; none for a single reward."""
    return {name: np.subtract(scores, reference.parts[name], dtype=np.float64) for name, scores in policy.parts.items()}


def share_confirmed(judge_gain: float, reward_gain: float) -> float:
    """judge_gain / reward_gain: how much of what PPO gained on its own objective a second opinion sees.

    0 where the reward model itself sees no gain: nothing was there to be confirmed.
    """
    return judge_gain / reward_gain if reward_gain > 0 else 0.0


def bootstrap_share(
    judge: np.ndarray, reward: np.ndarray, resamples: int, seed: int, groups: np.ndarray | None = None
) -> Interval:
    """`share_confirmed` of the mean gains, from per-prompt gains that are resampled together."""
    gains = np.stack([np.asarray(judge, dtype=np.float64), np.asarray(reward, dtype=np.float64)])
    return bootstrap_means(gains, resamples, seed, groups, lambda means: share_confirmed(*means.tolist()))


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of `n` words, in order; words are what white space parts."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams, in all texts together (Li et al. 2016); 0 where there are none."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetitions(texts: Sequence[str], n: int = 1) -> np.ndarray:
    """Per text, the share of its n-grams that occurred in it before; 0 for a text too short to have any."""
    counts = [(len(grams), len(set(grams))) for grams in (ngrams(text, n) for text in texts)]
    return np.array([1 - different / total if total else 0.0 for total, different in counts])


def same_length(texts: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each pair of texts cut to the words of the shorter one: longer texts repeat more, whoever writes them."""
    pairs = [(text.split(), other.split()) for text, other in zip(texts, others, strict=True)]
    shorter = [min(len(text), len(other)) for text, other in pairs]
    cut = [(" ".join(a[:n]), " ".join(b[:n])) for (a, b), n in zip(pairs, shorter, strict=True)]
    return [a for a, _ in cut], [b for _, b in cut]


def repetition(texts: Sequence[str], n: int = 1) -> float:
    """Mean of `repetitions`."""
    return float(repetitions(texts, n).mean()) if texts else 0.0


def relative_change(value: float, reference: float) -> float:
    """|value - reference| / reference. From 0 to anything counts as a change of 1: it has no other measure."""
    if reference == 0:
        return 0.0 if value == 0 else 1.0
    return abs(value - reference) / abs(reference)


def compare(policy: Responses, reference: Responses) -> dict[str, float]:
    """Policy against reference on the same prompts, point figures. Raises ValueError if the prompts differ.

    Gains in standard deviations of human-written text, `_se` their standard errors (`unconfirmed` is reward gain minus
    judge gain); `kl` in nats a response, `entropy` in nats a token, `length`
    in tokens.
    """
    if policy.prompts != reference.prompts:
        raise ValueError("policy and reference answered different prompts")
    judge, reward = (score_differences(policy, reference, role) for role in ("judge", "reward"))
    reward_gain, judge_gain = float(reward.mean()), float(judge.mean())
    return {
        "judge_win_rate": float(wins(judge, np.zeros_like(judge)).mean()),
        "reward_gain": reward_gain,
        "judge_gain": judge_gain,
        "judge_gain_se": standard_error(judge),
        "unconfirmed_se": standard_error(reward - judge),
        "judge_share": share_confirmed(judge_gain, reward_gain),
        "kl": _mean(policy.kl),
        "entropy": _mean(policy.entropy),
        "entropy_reference": _mean(reference.entropy),
        "length": _mean(policy.lengths),
        "length_reference": _mean(reference.lengths),
        "ended_rate": _mean(policy.ended),
        "ended_rate_reference": _mean(reference.ended),
        "distinct_2": distinct_n(policy.texts, 2),
        "distinct_2_reference": distinct_n(reference.texts, 2),
        "repetition": repetition(policy.texts),
        "repetition_reference": repetition(reference.texts),
        "repetition_3": repetition(policy.texts, n=3),
        "repetition_3_reference": repetition(reference.texts, n=3),
        "perplexity": float(np.exp(_mean(policy.ref_nll))),
        "perplexity_reference": float(np.exp(_mean(reference.ref_nll))),
        **{f"reward_gain_{name}": _mean(gain) for name, gain in part_gains(policy, reference).items()},
    }


def standard_error(x: np.ndarray) -> float:
    """Of the mean of independent cases `x`; 0 for a single one, which tells nothing of its own spread."""
    return float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else 0.0


def accuracy_interval(correct: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """The share of pairs that are right (1; 0.5 for a tie; 0) and its Wilson (1927) interval.

    `groups` names what hangs together: pairs of one group share texts, so that fewer cases are independent than there
    are pairs. Wilson's n is then divided by the design effect (Kish 1965), the clustered variance of the mean over the
    plain one.
    """
    correct = np.asarray(correct, dtype=np.float64)
    n = len(correct)
    if n == 0:
        raise ValueError("an accuracy needs at least one pair")
    p = float(correct.mean())
    m = n if groups is None else _independent_cases(correct - p, np.asarray(groups))
    return Interval(p, *wilson(p, m), n)


def wilson(p: float, n: float) -> tuple[float, float]:
    """The interval (low, high) around a share `p` of `n` independent cases."""
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def expected_calibration_error(
    probability: np.ndarray, target: np.ndarray, bins: int = 10
) -> tuple[float, list[dict[str, Any]]]:
    """ECE (Naeini et al. 2015) of P(chosen preferred) [N] against the share of raters who prefer it [N], and its bins.

    A pair is turned so that the model's favourite comes first. The order in the data is no help: there the chosen text
    comes first *because* of the label, and a model that is rightly unsure would look wrong. So confidences lie in
    [0.5, 1], which is cut into `bins` of equal width; each that is not empty is {low, high, n, confidence, agreement},
    the last two being means.
    """
    probability, target = np.asarray(probability, dtype=np.float64), np.asarray(target, dtype=np.float64)
    confidence = np.maximum(probability, 1 - probability)
    # Where the model has no favourite, both orders are as good: half of it each.
    agreement = np.select([probability > 0.5, probability < 0.5], [target, 1 - target], 0.5)
    found = [
        {"low": low, "high": high, "n": int(rows.sum())}
        | {"confidence": float(confidence[rows].mean()), "agreement": float(agreement[rows].mean())}
        for low, high, rows in _bins(confidence, np.linspace(0.5, 1.0, bins + 1))
    ]
    error = sum(b["n"] * abs(b["confidence"] - b["agreement"]) for b in found) / len(confidence)
    return float(error), found


def by_margin(correct: np.ndarray, margin: np.ndarray, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy by rating gap: {low, high, n, accuracy} for each [low, high) that has pairs.

    Gaps outside the edges count in the first or last bin.
    """
    correct = np.asarray(correct, dtype=np.float64)
    return [
        {"low": low, "high": high, "n": int(rows.sum()), "accuracy": float(correct[rows].mean())}
        for low, high, rows in _bins(np.asarray(margin), np.asarray(edges, dtype=np.float64))
    ]


def rater_ceiling(target: np.ndarray) -> float:
    """Mean of max(t, 1 - t): the share of single votes that agree with the majority of their pair.

    A vote is one rater pair's preference. No model that must name one text of each pair can agree with more of them.
    """
    target = np.asarray(target, dtype=np.float64)
    return float(np.maximum(target, 1 - target).mean())


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x, dtype=np.float64))


def _bins(x: np.ndarray, edges: np.ndarray) -> Iterator[tuple[float, float, np.ndarray]]:
    """(low, high, which of `x` [N] bool) of every bin that is not empty."""
    place = np.searchsorted(edges[1:-1], x, side="right")
    for i in np.unique(place):
        yield float(edges[i]), float(edges[i + 1]), place == i


def _independent_cases(residuals: np.ndarray, groups: np.ndarray) -> float:
    """How many independent cases are worth as much as these; at most as many as there are."""
    _, members = np.unique(groups, return_inverse=True)
    sums = np.bincount(members, weights=residuals)
    plain = float((residuals**2).sum())
    if plain == 0:  # all right or all wrong: nothing tells how alike the pairs of a group are
        return float(len(sums))
    clustered = float((sums**2).sum()) * len(sums) / max(len(sums) - 1, 1)
    return len(residuals) / max(clustered / plain, 1.0)
