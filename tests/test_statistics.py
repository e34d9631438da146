"""Statistics against hand derivation and against intervals that are known in closed form."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from answers import better_answers, reference_answers
from hypothesis import given
from hypothesis import strategies as st
from tiny import REPOSITORY

from tasks.statistics import (
    accuracy_interval,
    bootstrap_mean,
    bootstrap_share,
    by_margin,
    compare,
    distinct_n,
    expected_calibration_error,
    rater_ceiling,
    relative_change,
    repetition,
    same_length,
    score_differences,
    share_confirmed,
    wilson,
    wins,
)

HALVES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    x = np.random.default_rng(0).normal(2.0, 3.0, 900)
    interval = bootstrap_mean(x, 4000, seed=1)
    half = 1.96 * x.std() / 30
    assert interval.value == pytest.approx(x.mean(), abs=1e-12)
    assert interval.low == pytest.approx(x.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.05 * half)
    assert interval.n == 900


def test_bootstrap_interval_of_a_share_is_the_binomial_one():
    # 300 of 400: standard error sqrt(.75 * .25 / 400) = .02165, so .75 -+ .0424.
    interval = bootstrap_mean(np.repeat([1.0, 0.0], [300, 100]), 4000, seed=1)
    assert (interval.low, interval.high) == pytest.approx((0.7076, 0.7924), abs=0.004)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        interval = bootstrap_mean(draw.exponential(1.0, 120), 300, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    # 95 % nominal; 3 binomial standard errors are .038, and percentile intervals of skewed data fall a little short.
    assert 0.89 <= hits / 300 <= 0.99


def test_bootstrap_repeats_itself_and_refuses_nothing():
    x = np.arange(20.0)
    assert bootstrap_mean(x, 50, seed=5) == bootstrap_mean(x, 50, seed=5)
    assert bootstrap_mean(x, 50, seed=5) != bootstrap_mean(x, 50, seed=6)
    with pytest.raises(ValueError, match="at least one case"):
        bootstrap_mean(np.array([]), 50, seed=5)


def test_share_is_a_ratio_of_means_whose_parts_are_resampled_together():
    reward = np.random.default_rng(0).normal(2.0, 1.0, 200)
    # The judge confirms exactly half of every single gain: whatever is drawn, the ratio is one half.
    interval = bootstrap_share(reward / 2, reward, 200, seed=1)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_share_interval_is_that_of_the_delta_method():
    draw = np.random.default_rng(4)
    reward, judge = draw.normal(2.0, 1.0, 600), draw.normal(1.0, 1.0, 600)
    ratio = judge.mean() / reward.mean()
    half = 1.96 * (judge - ratio * reward).std() / reward.mean() / np.sqrt(600)
    interval = bootstrap_share(judge, reward, 3000, seed=1)
    assert (interval.low, interval.high) == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


@pytest.mark.parametrize(
    ("judge", "reward", "share"),
    [(0.5, 1.0, 0.5), (2.0, 1.0, 2.0), (-0.5, 1.0, -0.5), (1.0, 0.0, 0.0), (1.0, -1.0, 0.0)],
)
def test_share_confirmed(judge, reward, share):
    assert share_confirmed(judge, reward) == share


def test_ties_count_half():
    assert wins(np.array([2, 1, 1]), np.array([1, 1, 2])).tolist() == [1.0, 0.5, 0.0]


def test_wins_do_not_wrap_around_in_small_integers():
    assert wins(np.array([-100], np.int8), np.array([100], np.int8)).tolist() == [0.0]


def test_distinct_n_counted_by_hand():
    # ab ba ab | ab: 4 pairs, 2 different.
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    # Pairs do not reach over the end of a text.
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert distinct_n(["a", ""], 2) == 0.0


def test_repetition_counted_by_hand():
    # abc bca cab abc: one of four was there before. "a b" has no triple; "x x x x x" has three, two of them again.
    assert repetition(["a b c a b c"], n=3) == 1 / 4
    assert repetition(["a b c a b c", "a b", "x x x x x"], n=3) == pytest.approx((1 / 4 + 0 + 2 / 3) / 3)
    assert repetition(["a b c", "a b c"], n=3) == 0.0  # in another text it is no repetition
    assert repetition(["a a b", "b"]) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition([]) == 0.0


def test_relative_change():
    assert relative_change(1.2, 1.0) == pytest.approx(0.2)
    assert relative_change(0.8, 1.0) == pytest.approx(0.2)
    assert relative_change(0.0, 0.0) == 0.0
    assert relative_change(1e-6, 0.0) == 1.0


def test_a_policy_that_is_the_reference_wins_half_and_gains_nothing():
    reference = reference_answers()
    figures = compare(reference, reference)
    assert figures["judge_win_rate"] == 0.5
    assert figures["reward_gain"] == figures["judge_gain"] == figures["judge_share"] == figures["kl"] == 0.0


def test_compare_by_hand():
    before = replace(
        reference_answers(2), texts=["a b a b", "c"], reward=np.array([0.0, 1.0]), judge=np.array([0.5, -0.5]),
        ref_nll=np.array([1.0, 3.0]), lengths=np.array([4, 2]), ended=np.array([True, False]),
    )  # fmt: skip
    after = replace(
        before, texts=["a b c d", "a b"], reward=np.array([2.0, 3.0]), judge=np.array([2.5, -1.5]),
        kl=np.array([4.0, 6.0]), entropy=np.array([1.0, 2.0]), ref_nll=np.array([0.0, 2.0]),
    )  # fmt: skip
    figures = compare(after, before)
    assert figures["judge_win_rate"] == 0.5  # one won, one lost
    assert figures["reward_gain"] == 2.0
    assert figures["judge_gain"] == 0.5  # (2 - 1) / 2
    assert figures["judge_share"] == 0.25
    assert (figures["kl"], figures["entropy"], figures["length"], figures["ended_rate"]) == (5.0, 1.5, 3.0, 0.5)
    assert (figures["distinct_2"], figures["distinct_2_reference"]) == (3 / 4, 2 / 3)
    assert (figures["repetition_3"], figures["repetition"], figures["repetition_reference"]) == (0.0, 0.0, 0.25)
    assert figures["perplexity"] == pytest.approx(np.e)
    assert figures["perplexity_reference"] == pytest.approx(np.exp(2))


def test_equal_texts_tie_whatever_rounding_left_in_their_scores():
    reference = reference_answers(4)
    rounded = replace(reference, judge=reference.judge + 1e-7, reward=reference.reward + 1e-7)
    other = replace(rounded, texts=["another", *rounded.texts[1:]])
    for role in ("judge", "reward"):
        assert score_differences(rounded, reference, role).tolist() == [0.0] * 4
        assert (score_differences(other, reference, role) != 0).tolist() == [True, False, False, False]


def test_exchanging_the_models_turns_every_preference_around():
    reference = reference_answers()
    policy = better_answers(reference)
    there, back = compare(policy, reference), compare(reference, policy)
    assert there["judge_win_rate"] == pytest.approx(1 - back["judge_win_rate"])
    assert there["reward_gain"] == pytest.approx(-back["reward_gain"])
    assert there["judge_gain"] == pytest.approx(-back["judge_gain"])
    assert there["distinct_2"] == back["distinct_2_reference"]


def test_the_order_of_the_prompts_changes_nothing():
    reference = reference_answers()
    policy = better_answers(reference)
    order = np.random.default_rng(0).permutation(len(reference.prompts))

    def shuffled(answers):
        def moved(column):
            if isinstance(column, dict):
                return {name: moved(part) for name, part in column.items()}
            return column[order] if isinstance(column, np.ndarray) else [column[i] for i in order]

        return replace(answers, **{name: moved(column) for name, column in vars(answers).items()})

    assert compare(shuffled(policy), shuffled(reference)) == pytest.approx(compare(policy, reference), abs=1e-12)


def test_labels_that_mean_nothing_show_no_difference():
    """A coin decides which of two answers is called the policy's: the interval holds zero about 95 times in 100."""
    draw = np.random.default_rng(8)
    holds = 0
    for trial in range(200):
        difference = draw.normal(0.8, 1.0, 100) * draw.choice([-1, 1], 100)
        interval = bootstrap_mean(difference, 300, seed=trial)
        holds += interval.low <= 0 <= interval.high
    assert 0.89 <= holds / 200 <= 0.99


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="different prompts"):
        compare(reference_answers(4, seed=1), reference_answers(4, seed=2))


def test_wilson_interval_against_the_published_example():
    # Newcombe 1998, table I: 81 of 263 gives .2553 to .3662; 0 of 20 gives 0 to .1611.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_accuracy_counts_ties_half_and_is_wilsons():
    interval = accuracy_interval(np.array([1, 1, 0.5, 0]))
    assert (interval.value, interval.n) == (0.625, 4)
    assert (interval.low, interval.high) == wilson(0.625, 4)


def test_pairs_of_one_group_count_as_the_few_cases_that_they_are():
    correct = np.repeat(np.random.default_rng(0).integers(0, 2, 50), 6).astype(float)
    groups = np.repeat(np.arange(50), 6)
    clustered = accuracy_interval(correct, groups)
    # Six copies of each case hold no more than one: about the interval of 50 cases.
    low, high = wilson(correct.mean(), 49)
    assert (clustered.low, clustered.high) == pytest.approx((low, high), abs=1e-9)
    assert clustered.n == 300
    assert accuracy_interval(correct).low > clustered.low


def test_groups_of_one_or_all_alike_stay_sensible():
    correct = np.array([1.0, 0, 1, 1])
    assert accuracy_interval(correct, np.arange(4)).low <= accuracy_interval(correct).low
    assert accuracy_interval(np.ones(12), np.repeat([0, 1, 2], 4)).low == wilson(1.0, 3)[0]


@given(HALVES)
def test_accuracy_lies_in_its_interval(correct):
    interval = accuracy_interval(np.array(correct))
    assert 0 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1


def test_calibration_by_hand():
    # Confidences .95 .95 .65 .5; the second pair's favourite is the rejected text, which .7 of the raters prefer.
    error, bins = expected_calibration_error(np.array([0.95, 0.05, 0.65, 0.5]), np.array([1.0, 0.3, 0.2, 0.9]), bins=5)
    assert [b["low"] for b in bins] == pytest.approx([0.5, 0.6, 0.9])
    assert [b["n"] for b in bins] == [1, 1, 2]
    assert [b["agreement"] for b in bins] == pytest.approx([0.5, 0.2, 0.85])
    # 1/4 |.5 - .5| + 1/4 |.65 - .2| + 2/4 |.95 - .85|
    assert error == pytest.approx(0.1125 + 0.05)


def test_calibration_does_not_see_which_text_was_listed_first():
    draw = np.random.default_rng(2)
    probability, target = draw.random(500), draw.random(500)
    turned = draw.random(500) < 0.5
    other = expected_calibration_error(
        np.where(turned, 1 - probability, probability), np.where(turned, 1 - target, target)
    )
    assert other[0] == pytest.approx(expected_calibration_error(probability, target)[0], abs=1e-12)


def test_a_model_that_knows_the_shares_is_calibrated_though_the_data_lists_winners_first():
    share = np.random.default_rng(5).random(20000)
    hard = np.random.default_rng(6).random(20000) < share
    # Listed by the label: the probability that the listed winner wins, and a target of 1 throughout.
    error, _ = expected_calibration_error(np.where(hard, share, 1 - share), np.ones(20000))
    assert error < 0.02


def test_full_confidence_falls_into_the_last_bin():
    error, bins = expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    assert error == 0.0
    assert (bins[0]["high"], bins[0]["n"]) == (1.0, 2)


def test_accuracy_by_margin_by_hand():
    found = by_margin(np.array([1, 0, 1, 0.5]), np.array([0.2, 1.0, 1.5, 9.0]), (0, 1, 2, 3))
    assert found == [
        {"low": 0.0, "high": 1.0, "n": 1, "accuracy": 1.0},
        {"low": 1.0, "high": 2.0, "n": 2, "accuracy": 0.5},
        {"low": 2.0, "high": 3.0, "n": 1, "accuracy": 0.5},  # beyond the last edge counts in the last bin
    ]


def test_rater_ceiling_is_what_the_majority_answer_reaches():
    # Of 10 votes a pair: 8 and 7 agree with the majority.
    assert rater_ceiling(np.array([0.8, 0.3])) == pytest.approx(0.75)


def test_statistics_need_no_torch():
    code = "import sys, tasks.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_texts_are_compared_at_the_length_of_the_shorter():
    assert same_length(["a b c d", "a"], ["x y", "x y z"]) == (["a b", "a"], ["x y", "x"])
