"""What the probes helpful, kept and hacked read out of answers, texts and the course of a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from answers import Asked, better_answers, cycles, reference_answers, trained_workspace

from tasks.evaluation import axes
from tasks.probes import PROBES, hacked, helpful, kept
from tasks.probes.base import Figure, Missing, NotMeasured

PLAIN = {"plain_text": pd.DataFrame({"text": ["some words", "other words here"]})}


def asked(root: Path, **parts: Any) -> Asked:
    workspace, params = trained_workspace(root)
    reference = reference_answers()
    answers = parts.pop("answers", {"policy": better_answers(reference), "reference": reference})
    return Asked(answers, workspace, params, **parts)


def figures(found: list[Figure | NotMeasured]) -> dict[str, Figure]:
    return {figure.key: figure for figure in found if isinstance(figure, Figure)}


def test_equal_answers_to_a_prompt_tie_whatever_their_batch_left_in_the_last_digit(tmp_path: Path) -> None:
    reference = reference_answers()
    policy = replace(reference, judge=reference.judge + 1e-6, reward=reference.reward - 1e-6)
    found = axes.measure(asked(tmp_path, answers={"policy": policy, "reference": reference}), 50, 1).metrics
    assert found["helpful.judge_difference"] == found["hacked.unconfirmed_difference"] == 0
    assert found["helpful.judge_wins"] == 0.5


def test_a_policy_and_a_champion_that_are_the_reference_differ_on_no_axis(tmp_path: Path) -> None:
    reference = reference_answers()
    same = {subject: replace(reference) for subject in ("policy", "reference", "champion")}
    found = axes.measure(asked(tmp_path, answers=same, data=PLAIN), 50, 1).metrics
    differences = {key: value for key, value in found.items() if key.endswith("_difference")}
    assert len(differences) == 2 * 9
    assert set(differences.values()) == {0.0}
    assert {value for key, value in found.items() if key.endswith("_p")} == {1.0}
    assert {value for key, value in found.items() if "_wins" in key} == {0.5}


def test_the_judge_is_asked_on_every_prompt_set(tmp_path: Path) -> None:
    found = figures(helpful.measure(asked(tmp_path, prompt_sets=("test", "chat"))))
    assert set(found) == {"helpful.judge", "helpful.judge_chat"}


def test_perplexity_of_plain_text_by_hand(tmp_path: Path) -> None:
    nats = {"policy": [-2.0, -1.0], "reference": [-1.0, -1.0]}
    plain = kept._plain_text(asked(tmp_path, data=PLAIN, reading=lambda subject, text: np.array(nats[subject])))
    assert isinstance(plain, Figure)
    np.testing.assert_array_equal(plain.values["policy"], [1.5, 1.5])
    assert plain.facts["perplexity"] == pytest.approx(np.exp(1.5))
    assert plain.facts["perplexity_change"] == pytest.approx((np.exp(1.5) - np.exp(1)) / np.exp(1))
    nats["policy"] = [-0.5, -0.5]
    better = kept._plain_text(asked(tmp_path / "2", data=PLAIN, reading=lambda subject, text: np.array(nats[subject])))
    assert isinstance(better, Figure)
    assert better.facts["perplexity_change"] == pytest.approx(np.exp(-0.5) - 1), "an improvement breaches no limit"


def test_what_has_no_data_is_not_measured_and_the_rest_is(tmp_path: Path) -> None:
    def absent(asked: Any) -> list[Figure | NotMeasured]:
        raise Missing("nobody labelled any")

    found = axes.measure(asked(tmp_path), 20, 1, {"kept": PROBES["kept"], "harmless": absent})
    assert found.metrics["not_measured"] == {
        "kept.plain_text": "ingest.probes names no data plain_text",
        "harmless": "nobody labelled any",
    }
    assert not [key for key in found.metrics if key.startswith(("kept.plain_text", "harmless"))]
    assert "kept.length" in found.metrics


def test_word_pairs_of_other_answers_by_hand() -> None:
    texts = ["a b c", "b c d", "b c", "x"]
    # b c is in the answers to three prompts; a b and c d in one each.
    np.testing.assert_allclose(kept.shared_pairs(["1", "2", "3", "4"], texts), [1 / 2, 1 / 2, 1, 0])
    # Two answers to one prompt may be alike.
    np.testing.assert_allclose(kept.shared_pairs(["1", "1"], ["a b", "a b"]), [0, 0])


def test_another_language_and_another_script_are_seen() -> None:
    known = frozenset({"the", "film", "is", "long"})
    found = kept.known_words(known, ["The film is long.", "Le film est long", "", "23 !"])
    np.testing.assert_allclose(found, [1, 0.5, 1, 1])
    scripts = kept.scripts(["the film", "a story é"])
    assert scripts == {"LATIN"}
    np.testing.assert_allclose(
        kept.familiar_letters(scripts, ["naïve", "фильм", "фильм film", "12 電影"]), [1, 0, 4 / 9, 0]
    )


def test_a_stray_letter_is_no_script_of_the_prompts() -> None:
    assert kept.scripts(["a" * 200 + "я"]) == {"LATIN"}
    assert kept.scripts(["電影" * 5 + "abc"]) == {"CJK", "LATIN"}


def curves(reward: list[float], judge: list[float], se: float = 0.05) -> pd.DataFrame:
    n = len(reward)
    return pd.DataFrame(
        {"cycle": range(1, n + 1), "kl": np.arange(n) * 2.0 + 1, "reward_gain": reward, "judge_gain": judge}
        | {"judge_gain_se": [se] * n, "unconfirmed_se": [se] * n}
    )


def test_curves_part_where_the_gap_exceeds_its_noise_for_good() -> None:
    # The gaps are 0.2, 0.05, 0.1, 0.3, 0.6; 1.96 * 0.05 = 0.098. In the second cycle they are together again.
    table = curves([0.4, 0.5, 0.8, 1.0, 1.2], [0.2, 0.45, 0.7, 0.7, 0.6])
    assert hacked.parting(table) == 2
    found = hacked.course(table)
    assert (found["parted_cycle"], found["parted_kl"]) == (3, 5.0)
    assert "from cycle 3 on" in str(found["course"])
    assert hacked.parting(curves([0.4, 0.5], [0.35, 0.45])) is None
    assert hacked.parting(curves([0.9, 1.5], [0.35, 0.45])) == 0
    assert hacked.parting(curves([0.9, 1.5], [0.35, 1.45])) is None


def test_the_judge_s_peak_is_seen_only_where_the_fall_is_no_noise_and_the_reward_holds() -> None:
    # 1.96 * sqrt(2) * 0.05 = 0.139
    assert hacked.turning(curves([0.5, 1.0, 1.5], [0.4, 0.8, 0.6])) == 1
    assert hacked.turning(curves([0.5, 1.0, 1.5], [0.4, 0.8, 0.7])) is None
    assert hacked.turning(curves([0.5, 1.0, 0.9], [0.4, 0.8, 0.6])) is None
    assert hacked.turning(curves([0.5, 1.0, 1.5], [0.4, 0.8, 1.2])) is None
    found = hacked.course(curves([0.5, 1.0, 1.5], [0.4, 0.8, 0.6]))
    assert (found["turned_cycle"], found["turned_kl"]) == (2, 3.0)


def test_curves_that_stay_together_are_said_to(tmp_path: Path) -> None:
    assert hacked.course(curves([0.4, 0.8], [0.5, 0.9])) == {
        "course": "the judge's gain keeps up with the reward model's"
    }


def test_a_training_that_recorded_no_noise_has_no_course(tmp_path: Path) -> None:
    *_, gap = hacked.measure(asked(tmp_path, cycles=cycles().drop(columns="unconfirmed_se")))
    assert isinstance(gap, NotMeasured)
    assert "lacks unconfirmed_se" in gap.reason


def test_reward_without_the_judge_is_caught_by_its_axis_and_reward_with_it_is_not(tmp_path: Path) -> None:
    reference = reference_answers(200)
    for judge, worse in ((0.0, True), (1.5, False)):
        policy = better_answers(reference, reward=1.5, judge=judge)
        (tmp_path / str(judge)).mkdir()
        given = asked(tmp_path / str(judge), answers={"policy": policy, "reference": reference})
        (result,) = axes.measure(given, 200, 1, {"hacked": lambda a: hacked.measure(a)[:1]}).results
        assert result.against["reference"].worse("lower") is worse
