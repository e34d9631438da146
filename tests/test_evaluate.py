"""The evaluate stage on made-up answers: what it measures, writes and records, and what it refuses."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from answers import FINGERPRINT, Asked, better_answers, reference_answers, trained_workspace

from tasks import evaluate
from tasks.errors import DataError, TrainingHealthError
from tasks.evaluate import measure
from tasks.models.responses import Responses
from tasks.registration.champion import Champion
from tasks.stages import run_stage
from tasks.statistics import compare


@dataclass
class FakeTracker:
    client: Any = None
    run_id: str = "run-1"
    opened: list[str] = field(default_factory=list)
    logged: dict[str, Any] = field(default_factory=dict)
    report: set[str] = field(default_factory=set)

    def open(self, workspace: Any, fingerprint: str, params: Any) -> FakeTracker:
        self.opened.append(fingerprint)
        return self

    def __enter__(self) -> FakeTracker:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log_stage(self, stage: str, metrics: dict[str, Any], report: Path) -> None:
        self.logged[stage] = metrics
        self.report = {path.name for path in report.iterdir()}


@dataclass
class Staged:
    """What the stage is given in place of models, registry and MLflow."""

    tracker: FakeTracker
    answers: dict[str, Responses]
    champion: Champion

    def asked(self, params: Any, workspace: Any, cycles: pd.DataFrame, champion: Path | None) -> Asked:
        left_out = () if champion else ("champion",)
        return Asked({s: a for s, a in self.answers.items() if s not in left_out}, workspace, params, cycles)

    @contextmanager
    def present(self, client: Any, name: str, workspace: Any) -> Iterator[Champion]:
        yield self.champion


@pytest.fixture
def staged(monkeypatch):
    reference = reference_answers()
    staged = Staged(
        FakeTracker(),
        {"policy": better_answers(reference), "reference": reference, "champion": better_answers(reference, 0.8, 0.6)},
        Champion("aligned-policy"),
    )
    monkeypatch.setattr(evaluate, "Responders", staged.asked)
    monkeypatch.setattr(evaluate, "Tracker", staged.tracker)
    monkeypatch.setattr(evaluate.champion, "present", staged.present)
    monkeypatch.setattr(evaluate.inspection, "drawn_prompts", lambda *asked: [])  # there is no model to look into
    return staged


@pytest.fixture
def trained(tmp_path):
    return trained_workspace(tmp_path)


def test_the_stage_leaves_metrics_samples_and_report(staged, trained):
    workspace, params = trained
    result = run_stage("evaluate", params, workspace)
    written = json.loads(workspace.metrics("evaluate").read_text())
    assert written == result.metrics
    assert written["n"] == 40
    assert written["mlflow_run_id"] == "run-1"
    samples = pd.read_parquet(workspace.samples)
    assert list(samples) == [
        "prompt", "reference", "policy", "reward_reference", "reward_policy", "judge_reference", "judge_policy",
    ]  # fmt: skip
    assert samples["policy"].tolist() == staged.answers["policy"].texts
    np.testing.assert_array_equal(samples["judge_policy"], staged.answers["policy"].judge)
    files = {path.name for path in workspace.report("evaluate").iterdir()}
    assert {"report.html", "report.md", "curves.png"} <= files
    assert not list(workspace.root.rglob("*.writing"))


def test_it_is_recorded_in_the_run_of_the_training_with_its_report(staged, trained):
    workspace, params = trained
    result = evaluate.run(params, workspace)
    assert staged.tracker.opened == [FINGERPRINT]
    assert staged.tracker.logged == {"evaluate": result.metrics}
    assert {"report.html", "report.md", "curves.png"} <= staged.tracker.report


def test_the_summary_and_the_report_name_the_result(staged, trained):
    workspace, params = trained
    result = evaluate.run(params, workspace)
    rate = f"{100 * result.metrics['judge_win_rate']:.1f} %"
    assert rate in result.summary
    assert "\n" not in result.summary
    assert rate in (workspace.report("evaluate") / "report.md").read_text()


def test_the_models_that_were_asked_are_gone_before_the_inspector_loads_its_own(staged, trained, monkeypatch):
    workspace, params = trained
    asked = []

    def remembered(*given):
        made = staged.asked(*given)
        asked.append(weakref.ref(made))
        return made

    def inspect(*_):
        assert [kept() for kept in asked] == [None]
        return []

    monkeypatch.setattr(evaluate, "Responders", remembered)
    monkeypatch.setattr(evaluate.inspection, "inspect", inspect)
    evaluate.run(params, workspace)
    assert len(asked) == 1


def test_every_figure_is_finite_and_lies_in_its_interval():
    reference = reference_answers()
    metrics = measure(better_answers(reference), reference, 200, seed=1)
    assert all(math.isfinite(value) for value in metrics.values())
    bounded = [name.removesuffix("_low") for name in metrics if name.endswith("_low")]
    assert {"judge_win_rate", "reward_gain", "judge_gain", "judge_share", "kl"} <= set(bounded)
    for name in bounded:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]


def test_the_figures_are_those_of_every_cycle():
    reference = reference_answers()
    policy = better_answers(reference)
    metrics = measure(policy, reference, 50, seed=1)
    assert compare(policy, reference).items() <= metrics.items()


def test_the_same_seed_gives_the_same_figures():
    reference = reference_answers()
    policy = better_answers(reference)
    assert measure(policy, reference, 50, seed=1) == measure(policy, reference, 50, seed=1)


def test_a_policy_that_is_the_reference_shows_nothing():
    reference = reference_answers()
    metrics = measure(reference, reference, 50, seed=1)
    assert (metrics["judge_win_rate_low"], metrics["judge_win_rate_high"]) == (0.5, 0.5)
    assert (metrics["reward_gain_low"], metrics["judge_gain_high"], metrics["judge_share_high"]) == (0, 0, 0)
    assert metrics["distinct_2_change"] == metrics["repetition_change"] == 0


def test_the_last_digit_of_a_score_is_no_win_where_the_answers_are_equal():
    reference = reference_answers()
    policy = replace(reference, judge=reference.judge + 1e-7, reward=reference.reward + 1e-7)
    metrics = measure(policy, reference, 50, seed=1)
    assert metrics["judge_win_rate"] == metrics["reward_win_rate"] == 0.5
    assert metrics["judge_gain"] == metrics["reward_gain"] == 0


def test_changes_of_the_language_by_hand():
    reference = replace(reference_answers(2), texts=["a b c a b c", "d e f g"])
    policy = replace(reference, texts=["a b c a b c", "d e f d e f"])
    metrics = measure(policy, reference, 20, seed=1)
    # Pairs: 3 of 5 and 3 of 3 are different, 6 of 8; afterwards 3 + 3 of 10. Words again: 3/6 and 0, then 3/6 twice.
    assert metrics["distinct_2_change"] == pytest.approx(abs(6 / 10 - 6 / 8) / (6 / 8))
    assert metrics["repetition_change"] == pytest.approx(1.0)
    assert metrics["repetition_difference"] == pytest.approx(1 / 4)
    # Triples again: 1/4 and 0, then 1/4 twice.
    assert metrics["repetition_3_difference"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", ["reward", "judge", "kl", "ref_nll"])
def test_a_figure_that_is_not_finite_ends_the_stage_and_leaves_what_was_there(staged, trained, name):
    workspace, params = trained
    earlier = workspace.report("evaluate") / "report.html"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    broken = getattr(staged.answers["policy"], name).copy()
    broken[3] = np.nan
    staged.answers["policy"] = replace(staged.answers["policy"], **{name: broken})
    with pytest.raises(TrainingHealthError, match=rf"test prompt 3 — {name} is not finite for 1 of 40"):
        evaluate.run(params, workspace)
    assert earlier.read_text() == "earlier"
    assert not workspace.samples.exists()
    assert staged.tracker.logged == {}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(staged, trained, monkeypatch):
    workspace, params = trained
    earlier = workspace.report("evaluate") / "report.html"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluate, "write_report", full)
    with pytest.raises(OSError, match="no space"):
        evaluate.run(params, workspace)
    assert earlier.read_text() == "earlier"
    assert not workspace.samples.exists()


def test_without_a_training_it_says_what_to_run_first(staged, trained):
    workspace, params = trained
    workspace.cycles_csv.unlink()
    with pytest.raises(DataError, match=r"plots/cycles.csv — is missing.*python -m tasks ppo"):
        evaluate.run(params, workspace)
    assert staged.tracker.opened == []


def test_a_run_that_was_deleted_is_told(staged, trained, caplog):
    workspace, params = trained
    staged.tracker.run_id = "run-2"
    assert evaluate.run(params, workspace).metrics["mlflow_run_id"] == "run-2"
    assert "run-1 is gone" in caplog.text
