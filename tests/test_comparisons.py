"""Intervals by group and paired tests, against hand derivation and scipy's permutation test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tasks.errors import TrainingHealthError
from tasks.evaluation.comparisons import Comparison, as_metrics, judged, sign_flip
from tasks.probes.base import Figure
from tasks.statistics import Interval, bootstrap_mean


def figure(**values: np.ndarray) -> Figure:
    return Figure("axis.key", "a figure", "what it means", "higher", values, wins=True)


def test_sign_flips_by_hand() -> None:
    # Of the eight sign patterns of 1, 2, 3 two reach |6|.
    assert sign_flip(np.array([1.0, 2.0, 3.0]), 10, seed=1) == 2 / 8
    # The sums of +-3 +-1 +-1 are 1, 3 or 5 in size: all reach |3 - 1 - 1|.
    assert sign_flip(np.array([3.0, -1.0, -1.0]), 10, seed=1) == 1.0


def test_ties_weigh_nothing_and_nothing_but_ties_is_no_difference() -> None:
    assert sign_flip(np.array([0.0, 1.0, 0.0, 2.0, 3.0, 0.0]), 10, seed=1) == 2 / 8
    assert sign_flip(np.zeros(50), 10, seed=1) == 1.0


def test_many_items_agree_with_scipy() -> None:
    draw = np.random.default_rng(3)
    x = draw.normal(0.25, 1.0, 80)
    oracle = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=20_000, rng=draw)
    assert sign_flip(x, 20_000, seed=1) == pytest.approx(oracle.pvalue, abs=0.006)


def test_items_of_a_group_change_their_sign_together() -> None:
    # Six answers to two prompts are two cases: both patterns of one sign reach the sum, 2 of 4.
    x, prompts = np.array([1.0, 2.0, 1.0, 2.0, 3.0, 1.0]), np.array(["a", "a", "b", "b", "a", "b"])
    assert sign_flip(x, 10, 1, prompts) == 2 / 4


def test_equal_models_are_told_apart_as_often_as_the_level_says() -> None:
    draw = np.random.default_rng(5)
    found = [sign_flip(draw.standard_t(3, 40), 200, seed) < 0.05 for seed in range(400)]
    assert 0.02 < np.mean(found) < 0.085  # 5 %, three binomial standard errors being 3.3 %


def test_the_answers_to_a_prompt_are_one_case_of_the_bootstrap() -> None:
    x = np.random.default_rng(0).normal(1.0, 2.0, 300)
    alone = bootstrap_mean(x, 500, seed=1)
    again = bootstrap_mean(np.repeat(x, 3), 500, 1, np.repeat(np.arange(300), 3))
    assert (again.value, again.low, again.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert (alone.n, again.n) == (300, 900)


def test_groups_of_unequal_size_keep_the_mean_over_items() -> None:
    interval = bootstrap_mean(np.array([0.0, 1.0, 1.0, 1.0]), 200, 1, np.array([0, 1, 1, 1]))
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_identical_subjects_show_nothing_at_all() -> None:
    x = np.random.default_rng(0).normal(0, 1, 60)
    result = judged(figure(policy=x, reference=x.copy(), champion=x.copy()), 200, seed=1)
    for other in ("reference", "champion"):
        found = result.against[other]
        assert (found.difference.value, found.difference.low, found.difference.high, found.p) == (0, 0, 0, 1)
        assert found.wins is not None
        assert (found.wins.value, found.wins.low, found.wins.high) == (0.5, 0.5, 0.5)


def test_metrics_name_every_subject_and_both_comparisons() -> None:
    better = figure(
        policy=np.array([1.0, 2.0, 4.0, 3.0]), reference=np.zeros(4), champion=np.array([1.0, 1.0, 5.0, 3.0])
    )
    found = as_metrics([judged(better, 100, seed=1)])
    assert (found["axis.key"], found["axis.key_reference"], found["axis.key_champion"]) == (2.5, 0.0, 2.5)
    assert (found["axis.key_difference"], found["axis.key_champion_difference"]) == (2.5, 0.0)
    assert (found["axis.key_difference_p"], found["axis.key_champion_difference_p"]) == (2 / 16, 1.0)
    assert (found["axis.key_wins"], found["axis.key_champion_wins"]) == (1.0, 0.5)
    assert found["axis.key_n"] == 4
    assert {f"axis.key_difference{end}" for end in ("_low", "_high")} <= found.keys()


@pytest.mark.parametrize(
    ("better", "value", "p", "worse"),
    [
        ("higher", -1.0, 0.01, True), ("higher", 1.0, 0.01, False), ("higher", -1.0, 0.2, False),
        ("lower", 1.0, 0.01, True), ("lower", -1.0, 0.01, False), ("same", 1.0, 0.01, True), ("same", -1.0, 0.01, True),
    ],
)  # fmt: skip
def test_worse_is_what_chance_does_not_explain_on_the_bad_side(
    better: str, value: float, p: float, worse: bool
) -> None:
    assert Comparison(Interval(value, value, value, 9), p, None).worse(better) is worse


def test_items_that_do_not_match_or_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"axis.key: the subjects have \[2, 3\] items"):
        judged(figure(policy=np.zeros(2), reference=np.zeros(3)), 10, seed=1)
    with pytest.raises(TrainingHealthError, match=r"axis.key — is not finite for reference"):
        judged(figure(policy=np.zeros(2), reference=np.array([0.0, np.nan])), 10, seed=1)
