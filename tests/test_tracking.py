"""The record in MLflow, on SQLite: runs that are continued, cycles recorded once, services that go away."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from stores import RECORD, new_store, trained_weights
from tiny import tiny_params
from waiting import eventually, has_ended

from tasks import tracking
from tasks.errors import Locked, ServiceError, TrainingHealthError
from tasks.params import Params, check_params
from tasks.processes import HOST, PID, STARTED
from tasks.tracking import Tracker, record_exists
from tasks.workspace import Workspace

pytest_plugins = ["stores"]


@pytest.fixture
def params() -> Params:
    return check_params(tiny_params())


def changed(**ppo: Any) -> Params:
    plain = tiny_params()
    plain["ppo"] |= ppo
    return check_params(plain)


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, key)]


def test_the_store_does_not_depend_on_the_working_directory(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with Tracker.open(home, "f" * 64, params) as tracker:
        run = tracker.client.get_run(tracker.run_id)
    assert tracking.tracking_uri(home) == f"sqlite:///{home.root}/mlflow.db"
    assert run.info.artifact_uri.startswith((home.root / "mlartifacts").as_uri())
    assert list(elsewhere.iterdir()) == []


def test_a_run_is_continued_by_its_fingerprint(home: Workspace, params: Params) -> None:
    with Tracker.open(home, "a" * 64, params) as first:
        assert first.client.get_run(first.run_id).info.status == "RUNNING"
    assert first.client.get_run(first.run_id).info.status == "FINISHED"
    with Tracker.open(home, "a" * 64, changed(cycles=7)) as again, Tracker.open(home, "b" * 64, params) as other:
        run = again.client.get_run(again.run_id)
        assert run.info.status == "RUNNING"
        assert run.data.params["ppo.cycles"] == "2"
        assert run.data.tags["changed.ppo.cycles"] == "7"
        assert again.run_id == first.run_id != other.run_id
    with Tracker.open(home, "a" * 64, params) as back:
        assert not any(tag.startswith("changed.") for tag in back.client.get_run(back.run_id).data.tags)
    assert mlflow.active_run() is None


def test_params_are_flat_and_cut_with_a_note(home: Workspace) -> None:
    plain = tiny_params()
    plain["ingest"]["data"][0]["licence"] = "x" * 7000
    with Tracker.open(home, "a" * 64, check_params(plain)) as tracker:
        pass
    with Tracker.open(home, "a" * 64, check_params(plain)) as tracker:
        data = tracker.client.get_run(tracker.run_id).data
    assert data.params["ppo.update.learning_rate"] == "0.001"
    assert data.params["ingest.data.0.format"] == "ratings"
    assert len(data.params["ingest.data.0.licence"]) == 6000
    assert data.params["ingest.data.0.licence"].endswith("(cut; whole in the artifact params.yaml)")
    assert "changed.ingest.data.0.licence" not in data.tags


def test_data_and_code_are_recorded(workspace: Workspace, params: Params) -> None:
    new_store(workspace)
    workspace.canonical.mkdir(parents=True)
    source = {"name": "ratings", "source": "file:r.jsonl", "sha256": "c" * 64, "licence": "MIT", "rows": 240}
    workspace.provenance.write_text(json.dumps([source]), encoding="utf-8")
    workspace.pairs.write_bytes(b"pairs")
    workspace.prompts.write_bytes(b"prompts")
    for _ in range(2):
        with Tracker.open(workspace, "a" * 64, params) as tracker:
            run = tracker.client.get_run(tracker.run_id)
    found = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
    assert sorted(found) == ["pairs.parquet", "prompts.parquet", "ratings"]
    assert len(run.inputs.dataset_inputs) == 3
    assert found["ratings"].digest == "c" * 36
    assert json.loads(found["ratings"].source)["sha256"] == "c" * 64
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace.root, capture_output=True, text=True, check=True
    )
    assert run.data.tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert run.data.tags["proximal.git.dirty"] == "false"


def test_a_cycle_is_recorded_once(home: Workspace, params: Params, tmp_path: Path) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    for _ in range(2):
        with Tracker.open(home, "a" * 64, params) as tracker:
            tracker.log_cycle(RECORD, weights)
            tracker.log_cycle({**RECORD, "cycle": 2, "dev/judge_win_rate": 0.75}, weights)
    assert history(tracker, "dev/judge_win_rate") == [(1, 0.625), (2, 0.75)]
    assert history(tracker, "train/kl") == [(1, 2.5), (2, 2.5)]
    ranked = tracker.client.search_logged_models(
        [tracker.run.info.experiment_id],
        "metrics.`dev/judge_win_rate` > 0.5",
        order_by=[{"field_name": "metrics.dev/judge_win_rate", "ascending": False}],
    )
    assert [model.name for model in ranked] == ["policy-cycle-2", "policy-cycle-1"]
    assert len(tracker.client.get_run(tracker.run_id).outputs.model_outputs) == 2


@pytest.mark.fault("13: a cycle half recorded in MLflow", expected="completed, one point a step")
@pytest.mark.parametrize("broken", ["log_model_artifacts", "finalize_logged_model", "log_outputs", "log_batch"])
def test_a_half_recorded_cycle_is_completed(
    home: Workspace, params: Params, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    tracker = Tracker.open(home, "a" * 64, params)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, broken, dies)
        with pytest.raises(KeyboardInterrupt):
            tracker.log_cycle(RECORD, weights)
    with Tracker.open(home, "a" * 64, params) as again:
        again.log_cycle(RECORD, weights)
    assert history(again, "dev/judge_win_rate") == [(1, 0.625)]
    models = again.client.search_logged_models([again.run.info.experiment_id])
    assert [(m.name, str(m.status.value), len(m.metrics)) for m in models] == [("policy-cycle-1", "READY", 2)]


def test_a_cycle_can_be_recorded_from_another_thread(home: Workspace, params: Params, tmp_path: Path) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    with Tracker.open(home, "a" * 64, params) as tracker:
        thread = threading.Thread(target=tracker.log_cycle, args=(RECORD, weights))
        thread.start()
        thread.join()
        runs = tracker.client.search_runs([tracker.run.info.experiment_id])
    assert history(tracker, "train/kl") == [(1, 2.5)]
    assert [run.info.run_id for run in runs] == [tracker.run_id]


@pytest.mark.fault("15: a figure for MLflow that is not finite", expected="exit 7, nothing of it recorded")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_refused(home: Workspace, params: Params, value: float, tmp_path: Path) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    with pytest.raises(TrainingHealthError, match=r"cycle 3.*train/kl"):
        tracker.log_cycle({"cycle": 3, "train/kl": value, "dev/kl": 1.0}, tmp_path / "unread")
    assert history(tracker, "dev/kl") == []
    tracker.close("FAILED")
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"


def test_stage_figures_are_flat_and_recorded_once(home: Workspace, params: Params, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>seen</p>", encoding="utf-8")
    metrics = {"judge": {"accuracy": 0.85, "n": 10, "by_margin": [0.5, 0.75]}, "name": "x", "gap": None, "ok": True}
    with Tracker.open(home, "a" * 64, params) as tracker:
        tracker.log_stage("reward_model", metrics, report)
        tracker.log_stage("reward_model", metrics, report)
    assert history(tracker, "reward_model.judge.accuracy") == [(0, 0.85)]
    assert history(tracker, "reward_model.judge.by_margin.1") == [(0, 0.75)]
    assert history(tracker, "reward_model.ok") == [(0, 1.0)]
    assert [a.path for a in tracker.client.list_artifacts(tracker.run_id, "reports/reward_model")] == [
        "reports/reward_model/report.html"
    ]


@pytest.mark.fault("a run in MLflow left RUNNING by a dead process", expected="KILLED when the next one opens")
@pytest.mark.parametrize("reaped", [True, False])
def test_a_run_left_open_by_a_dead_process_is_closed(home: Workspace, params: Params, reaped: bool) -> None:
    """Also where nobody has asked how the process ended, which leaves it as a zombie."""
    tracker = Tracker.open(home, "a" * 64, params)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        tracker.client.set_tag(tracker.run_id, PID, str(process.pid))
        tracker.client.set_tag(tracker.run_id, STARTED, str(psutil.Process(process.pid).create_time()))
        process.stdin.close()
        assert eventually(lambda: has_ended(process.pid))
        if reaped:
            process.wait()
        with Tracker.open(home, "b" * 64, params) as other:
            assert other.client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_later_process_of_the_same_number_is_another(home: Workspace, params: Params) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    began = float(tracker.client.get_run(tracker.run_id).data.tags[STARTED])
    tracker.client.set_tag(tracker.run_id, STARTED, str(began - 3600))
    with Tracker.open(home, "b" * 64, params) as other:
        assert other.client.get_run(tracker.run_id).info.status == "KILLED"


@pytest.mark.fault("21: an MLflow run that another process writes", expected="exit 6, process named")
def test_a_run_that_a_living_process_writes_is_locked(home: Workspace, params: Params) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    parent = psutil.Process().parent()
    tracker.client.set_tag(tracker.run_id, PID, str(parent.pid))
    tracker.client.set_tag(tracker.run_id, STARTED, str(parent.create_time()))
    with pytest.raises(Locked, match=f"process {parent.pid}"):
        Tracker.open(home, "a" * 64, params)
    # Another machine's process cannot be asked; the lock of the workspace is what guards there.
    tracker.client.set_tag(tracker.run_id, HOST, "elsewhere")
    with Tracker.open(home, "b" * 64, params) as other:
        assert other.client.get_run(tracker.run_id).info.status == "RUNNING"
    Tracker.open(home, "a" * 64, params).close("FINISHED")


def test_errors_and_interrupts_end_the_run_accordingly(home: Workspace, params: Params) -> None:
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), Tracker.open(home, "a" * 64, params) as tracker:
            raise error
        assert tracker.client.get_run(tracker.run_id).info.status == status


def test_a_dead_service_is_reported_at_once(home: Workspace, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        Tracker.open(home, "a" * 64, params)
    with pytest.raises(ServiceError):
        record_exists(home, "0" * 32)


@pytest.mark.fault("13: MLflow does not take a cycle", expected="kept, recorded with the next one, once")
def test_a_service_that_goes_away_does_not_end_training(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    tracker = Tracker.open(home, "a" * 64, params)

    def gone(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    def unreachable(_: str) -> None:
        raise ServiceError("MLflow does not answer")

    with monkeypatch.context() as outage:
        outage.setattr(MlflowClient, "log_batch", gone)
        outage.setattr(tracking, "_probe", unreachable)
        tracker.log_cycle(RECORD, weights)
        with pytest.raises(ServiceError, match="cycles not recorded: 1"):
            tracker.close("FINISHED")
    tracker.log_cycle({**RECORD, "cycle": 2}, weights)
    tracker.close("FINISHED")
    assert history(tracker, "train/kl") == [(1, 2.5), (2, 2.5)]


def test_other_errors_of_mlflow_are_not_taken_for_an_outage(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    with pytest.raises(MlflowException, match="Invalid value"):
        tracker.log_cycle({"cycle": 1, "no(such)name": 1.0}, trained_weights(home, tmp_path / "policy.safetensors"))


def test_record_exists(home: Workspace, params: Params, tmp_path: Path) -> None:
    with Tracker.open(home, "a" * 64, params) as tracker:
        pass
    assert record_exists(home, tracker.run_id)
    assert not record_exists(home, tracker.run_id, model_version=1)
    assert not record_exists(home, "0" * 32)
    tracker.client.delete_run(tracker.run_id)
    assert not record_exists(home, tracker.run_id)
    nowhere = Workspace(tmp_path / "nowhere")
    nowhere.root.mkdir()
    assert not record_exists(nowhere, tracker.run_id)
    assert list(nowhere.root.iterdir()) == []
