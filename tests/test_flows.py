"""The flow against a real Prefect server: states, retries, skips, worktrees, artifacts, runs that were left open.

Stages, DVC and the training run are stood in for: what they do is tested elsewhere.
"""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prefect
import pytest
import tiny
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_HOME

import tasks.ppo
import tasks.tracking
import tasks.versioning
from flows import gpu, lifecycle, pipeline, review
from tasks.errors import DataError, Problem, ResourceError, ServiceError
from tasks.params import Params, dump_params, load_params
from tasks.stages import STAGES, StageResult
from tasks.workspace import Workspace

pytest_plugins = ["flow_server"]

PICTURE = "![curve](data:image/svg+xml;base64,PHN2Zy8+)"
"""How an artifact shows the picture of a stage's report."""


class Stages:
    """Stands in for the stages, for DVC and for the training run; remembers what was asked of it."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.errors: dict[str, list[Exception]] = {}
        """By stage, or by cycle as `cycle N`: raised one a call."""
        self.ran: list[str] = []
        self.places: set[Path] = set()
        self.records: list[dict[str, Any]] = []

    def run(self, stage: str, params: Params, workspace: Workspace) -> StageResult:
        report = workspace.report(stage) / "report.md"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(f"# {stage} ![curve](curve.svg)", encoding="utf-8")
        report.with_name("curve.svg").write_bytes(b"<svg/>")
        self._called(stage)
        self.places.add(workspace.root)
        return StageResult({}, f"{stage} done")

    @contextmanager
    def open_run(self, params: Params, workspace: Workspace) -> Iterator[Any]:
        self._called("ppo")
        yield self

    @property
    def stopped(self) -> str | None:
        return "cycles" if len(self.records) == 3 else None

    def next_cycle(self) -> dict[str, Any]:
        self._called(f"cycle {len(self.records) + 1}")
        names = ("judge_win_rate", "reward_gain", "judge_gain", "kl")
        self.records.append({"cycle": len(self.records) + 1, **{f"dev/{name}": 0.5 for name in names}})
        return self.records[-1]

    def finish(self) -> StageResult:
        return StageResult({"cycles": 3, "mlflow_run_id": "abc"}, "three cycles")

    def _called(self, name: str) -> None:
        self.ran.append(name)
        if errors := self.errors.get(name):
            raise errors.pop(0)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(pipeline, "run_stage", stages.run)
    monkeypatch.setattr(tasks.ppo, "open_run", stages.open_run)
    monkeypatch.setattr(tasks.tracking, "connect", lambda workspace: SimpleNamespace(get_run=_mlflow_run))
    monkeypatch.setattr(tasks.versioning, "up_to_date", lambda stage, workspace: stage in stages.done)
    monkeypatch.setattr(tasks.versioning, "stage_guard", lambda stage, workspace, began: nullcontext())
    monkeypatch.setattr(tasks.versioning, "source_digests", lambda workspace: {})
    return stages


def _mlflow_run(run_id: str) -> SimpleNamespace:
    return SimpleNamespace(info=SimpleNamespace(experiment_id="7"))


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A folder with parameters; no models, no repository."""
    workspace = Workspace(tmp_path)
    workspace.params.write_text(yaml.safe_dump(tiny.tiny_params()), encoding="utf-8")
    return workspace


def run_of(client: SyncPrefectClient, place: Workspace) -> FlowRun:
    """The latest flow run in that workspace."""
    runs = client.read_flow_runs(sort="EXPECTED_START_TIME_DESC")
    return next(run for run in runs if run.parameters.get("workspace") == str(place.root))


def states(client: SyncPrefectClient, run: FlowRun, expected: int) -> list[tuple[str, str]]:
    """(name, state) of its task runs, oldest first. Prefect records them with a delay: waits for that many."""
    for _ in range(300):
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
        if len(found) >= expected and all(task.state is not None and task.state.is_final() for task in found):
            break
        time.sleep(0.1)
    found.sort(key=lambda task: task.start_time)
    return [(task.name, task.state_name) for task in found]


def artifact(client: SyncPrefectClient, run: FlowRun, key: str) -> Any:
    found = client.request(
        "POST",
        "/artifacts/filter",
        json={"artifacts": {"flow_run_id": {"any_": [str(run.id)]}, "key": {"any_": [key]}}},
    )
    return [row["data"] for row in found.json()]


def slots(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name(gpu.SLOT).active_slots


def test_every_stage_and_every_cycle_is_a_task_run(stages: Stages, place: Workspace, client: SyncPrefectClient) -> None:
    stages.done = {"ingest"}
    assert pipeline.align(None, str(place.root)) == str(place.root)
    run = run_of(client, place)
    completed = ["validate", "reward_model", "ppo", *(f"ppo cycle {n}" for n in (1, 2, 3)), "evaluate", "register"]
    assert states(client, run, 9) == [("ingest", "Skipped"), *((name, "Completed") for name in completed)]
    assert run.state_name == "Completed"
    assert artifact(client, run, "data-verdict") == [f"# validate {PICTURE}"]
    assert artifact(client, run, "alignment-report") == [f"# evaluate {PICTURE}"]
    (link,) = artifact(client, run, "mlflow-run")
    assert "/#/experiments/7/runs/abc" in link
    (table,) = artifact(client, run, "ppo-cycles")
    assert '"cycle": 3' in table
    assert artifact(client, run, "ppo-progress") == [100.0]
    assert client.read_global_concurrency_limit_by_name(gpu.SLOT).limit == 1
    assert slots(client) == 0


def test_all_up_to_date_runs_nothing_and_is_recorded(
    stages: Stages, place: Workspace, client: SyncPrefectClient
) -> None:
    stages.done = set(STAGES)
    pipeline.align(None, str(place.root))
    assert stages.ran == []
    assert states(client, run_of(client, place), 6) == [(stage, "Skipped") for stage in STAGES]


def test_force_runs_what_is_up_to_date(stages: Stages, place: Workspace, api: str) -> None:
    stages.done = set(STAGES)
    pipeline.align(None, str(place.root), force=True)
    assert [name for name in stages.ran if not name.startswith("cycle")] == list(STAGES)


def test_an_error_for_people_fails_the_run_with_its_message(
    stages: Stages, place: Workspace, client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    stages.errors["validate"] = [DataError([Problem("is empty", "a.csv:3:text", "fill it")] * 2)]
    with pytest.raises(DataError, match=re.escape("a.csv:3:text — is empty — fill it")):
        pipeline.align(None, str(place.root))
    run = run_of(client, place)
    assert states(client, run, 2) == [("ingest", "Completed"), ("validate", "Failed")]
    assert run.state_name == "Failed"
    assert "a.csv:3:text — is empty — fill it" in (run.state.message or "")
    assert artifact(client, run, "data-verdict") == [f"# validate {PICTURE}"], "the report says why"
    assert "Traceback" not in caplog.text
    assert not (PREFECT_HOME.value() / "storage").exists(), "nothing was pickled"


def test_only_services_are_asked_again(
    stages: Stages, place: Workspace, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.run_stage_task, "retry_delay_seconds", [0.01])
    stages.errors = {
        "ingest": [ServiceError("index away"), ServiceError("index away")],
        "cycle 2": [ServiceError("MLflow away")],
        "evaluate": [ResourceError("no memory")],
    }
    with pytest.raises(ResourceError):
        pipeline.align(None, str(place.root))
    assert stages.ran == ["ingest"] * 3 + ["validate", "reward_model", "ppo", "cycle 1", "cycle 2"] + [
        "ppo",  # opened again from its checkpoint, not from memory
        "cycle 2",
        "cycle 3",
        "evaluate",
    ]
    cycles = [state for state in states(client, run_of(client, place), 9) if "cycle" in state[0]]
    assert cycles == [
        (f"ppo cycle {n}", state) for n, state in ((1, "Completed"), (2, "Failed"), (2, "Completed"), (3, "Completed"))
    ]
    assert slots(client) == 0


def test_a_server_that_is_to_sample_is_asked_before_the_first_stage(
    stages: Stages, place: Workspace, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.tiny_params()
    place.params.write_text(yaml.safe_dump(raw | {"ppo": raw["ppo"] | {"sampler": "vllm"}}), encoding="utf-8")
    monkeypatch.setenv("PROXIMAL_VLLM_URL", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9/v1/models — the vLLM server does not answer"):
        pipeline.align(None, str(place.root))
    assert stages.ran == []


def test_a_full_disk_in_training_is_told_for_people(
    stages: Stages, place: Workspace, client: SyncPrefectClient
) -> None:
    """The flow runs ppo cycle by cycle, not through `run_stage`."""
    stages.errors["cycle 2"] = [OSError(errno.ENOSPC, "No space left on device", "models/policy")]
    with pytest.raises(ResourceError, match=r"models/policy — the disk is full"):
        pipeline.align(None, str(place.root))
    assert run_of(client, place).state_name == "Failed"


def test_a_bug_is_told_with_its_traceback(
    stages: Stages, place: Workspace, client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    stages.errors["ingest"] = [KeyError("gone")]
    with pytest.raises(KeyError):
        pipeline.align(None, str(place.root))
    assert "Traceback" in caplog.text
    assert run_of(client, place).state_name == "Failed"


def test_other_parameters_run_in_a_worktree_the_same_ones_in_the_same(
    stages: Stages, place: Workspace, api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    stages.done = set(STAGES) - {"validate"}

    def worktree(workspace: Workspace, params: Params, name: str) -> Workspace:
        asked.append((params.ppo.cycles, name))
        other = Workspace(tmp_path / "elsewhere")
        other.root.mkdir(exist_ok=True)
        other.params.write_text(yaml.safe_dump(dump_params(params)), encoding="utf-8")
        return other

    monkeypatch.setattr(tasks.versioning, "worktree", worktree)
    pipeline.align(load_params(place.params), str(place.root))
    assert (asked, stages.places) == ([], {place.root}), "unchanged parameters run in the checkout"
    changed = load_params(place.params, ["ppo.cycles=3"])
    for params in (changed, changed, load_params(place.params, ["ppo.cycles=4"])):
        assert pipeline.align(params, str(place.root)) == str(tmp_path / "elsewhere")
    assert [cycles for cycles, _ in asked] == [3, 3, 4]
    assert asked[0] == asked[1]
    assert asked[1][1] != asked[2][1]


@pytest.mark.fault("a flow run left RUNNING by a dead process", expected="Crashed at the next start, GPU slot free")
def test_what_dead_processes_left_open_is_closed(stages: Stages, place: Workspace, client: SyncPrefectClient) -> None:
    gpu.ensure_limit()
    lease = client.increment_concurrency_slots_with_lease([gpu.SLOT], 1, "concurrency", 600).json()["lease_id"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    tags = lifecycle.process_tags()
    dead.wait()
    gone = {**tags, "proximal.pid": str(dead.pid)}
    left = client.create_flow_run(pipeline.align, state=prefect.states.Running())
    client.update_flow_run_labels(left.id, gone | {gpu.LEASE: lease})
    asked = {"name": "m", "version": 1, "workspace": "/", "hours": 1.0}
    waited = client.create_flow_run(review.wait_for_decision, parameters=asked, state=prefect.states.Paused())
    client.update_flow_run_labels(waited.id, gone)
    alive = client.create_flow_run(pipeline.align, state=prefect.states.Running())
    client.update_flow_run_labels(alive.id, tags)
    pipeline.align(None, str(place.root))
    assert client.read_flow_run(left.id).state_name == "Crashed"
    assert client.read_flow_run(waited.id).state_name == "Crashed"
    assert client.read_flow_run(alive.id).state_name == "Running"
    client.delete_flow_run(alive.id)
    assert slots(client) == 0
