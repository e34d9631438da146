"""The flow on one real Prefect server: states, retries, skips, slots, artifacts, and what is left when a process dies.

Stages are stood in for where only the flow is in question; the last tests run the real pipeline on tiny models.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import prefect
import psutil
import pytest
import tiny
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
from rich.console import Console

import tasks.ppo
import tasks.versioning
from flows import align as command
from flows import artifacts, closing, gpu, lifecycle, pipeline, serve, server, ui
from flows.leash import leashed
from tasks.errors import DataError, Problem, ResourceError, ServiceError
from tasks.params import Params, dump_params, load_params
from tasks.stages import STAGES, StageResult
from tasks.workspace import Workspace


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of this file's own, where the code under test finds it."""
    home = tmp_path_factory.mktemp("prefect")
    port = server.free_port()
    url, env = server.api_url(port), {**server.prefect_environment(port), "PREFECT_HOME": str(home)}
    with leashed(server.prefect_command(port), home / "server.log", env) as child:
        server.wait_until(lambda: server.is_healthy(url), child, "Prefect", home / "server.log")
        settings = {PREFECT_API_URL: url, PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            yield url


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


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
        report.write_text(f"# {stage}", encoding="utf-8")
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
        return StageResult({"cycles": 3}, "three cycles")

    def _called(self, name: str) -> None:
        self.ran.append(name)
        if errors := self.errors.get(name):
            raise errors.pop(0)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(pipeline, "run_stage", stages.run)
    monkeypatch.setattr(tasks.ppo, "open_run", stages.open_run)
    monkeypatch.setattr(tasks.versioning, "up_to_date", lambda stage, workspace: stage in stages.done)
    monkeypatch.setattr(tasks.versioning, "stage_guard", lambda stage, workspace, began: nullcontext())
    monkeypatch.setattr(tasks.versioning, "source_digests", lambda workspace: {})
    return stages


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A folder with parameters; no models, no repository."""
    workspace = Workspace(tmp_path)
    workspace.params.write_text(yaml.safe_dump(tiny.tiny_params()), encoding="utf-8")
    return workspace


def run_of(client: SyncPrefectClient, place: Workspace) -> FlowRun:
    """The latest flow run in that workspace."""
    (run,) = [
        r
        for r in client.read_flow_runs(sort="EXPECTED_START_TIME_DESC")
        if r.parameters["workspace"] == str(place.root)
    ][:1]
    return run


def states(client: SyncPrefectClient, run: FlowRun) -> list[tuple[str, str]]:
    """(name, state) of its task runs, oldest first. Prefect records them with a delay."""
    for _ in range(100):
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
        if found and all(task.state is not None and task.state.is_final() for task in found):
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


# the flow, stages stood in for


def test_every_stage_and_every_cycle_is_a_task_run(stages: Stages, place: Workspace, client: SyncPrefectClient) -> None:
    stages.done = {"ingest"}
    assert pipeline.align(None, str(place.root)) == str(place.root)
    run = run_of(client, place)
    completed = ["validate", "reward_model", "ppo", *(f"ppo cycle {n}" for n in (1, 2, 3)), "evaluate", "register"]
    assert states(client, run) == [("ingest", "Skipped"), *((name, "Completed") for name in completed)]
    assert run.state_name == "Completed"
    assert artifact(client, run, "data-verdict") == ["# validate"]
    assert artifact(client, run, "alignment-report") == ["# evaluate"]
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
    assert states(client, run_of(client, place)) == [(stage, "Skipped") for stage in STAGES]


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
    assert states(client, run) == [("ingest", "Completed"), ("validate", "Failed")]
    assert run.state_name == "Failed"
    assert "a.csv:3:text — is empty — fill it" in (run.state.message or "")
    assert artifact(client, run, "data-verdict") == ["# validate"], "the report says why"
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
    cycles = [state for state in states(client, run_of(client, place)) if "cycle" in state[0]]
    assert cycles == [
        (f"ppo cycle {n}", state) for n, state in ((1, "Completed"), (2, "Failed"), (2, "Completed"), (3, "Completed"))
    ]
    assert slots(client) == 0


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

    def worktree(workspace: Workspace, params: dict[str, Any], name: str) -> Workspace:
        asked.append((params["ppo"]["cycles"], name))
        other = Workspace(tmp_path / "elsewhere")
        other.root.mkdir(exist_ok=True)
        other.params.write_text(yaml.safe_dump(params), encoding="utf-8")
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


def test_what_dead_processes_left_open_is_closed(stages: Stages, place: Workspace, client: SyncPrefectClient) -> None:
    gpu.ensure_limit()
    lease = client.increment_concurrency_slots_with_lease([gpu.SLOT], 1, "concurrency", 600).json()["lease_id"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    tags = lifecycle.process_tags()
    dead.wait()
    left = client.create_flow_run(pipeline.align, state=prefect.states.Running())
    client.update_flow_run_labels(left.id, {**tags, "proximal.pid": str(dead.pid), gpu.LEASE: lease})
    alive = client.create_flow_run(pipeline.align, state=prefect.states.Running())
    client.update_flow_run_labels(alive.id, tags)
    pipeline.align(None, str(place.root))
    assert client.read_flow_run(left.id).state_name == "Crashed"
    assert client.read_flow_run(alive.id).state_name == "Running"
    assert slots(client) == 0


# the GPU slot


def test_a_lost_lease_is_taken_again(client: SyncPrefectClient) -> None:
    gpu.ensure_limit()

    @prefect.flow
    def holds() -> None:
        slot = gpu._Slot(client)
        slot.take()
        assert not gpu._Slot(client).try_take(), "one slot, one holder"
        first = slot.lease
        slot.renew()
        assert slot.lease == first
        client.release_concurrency_slots_with_lease(first)  # as when it ran out
        slot.renew()
        assert slot.lease != first
        assert slots(client) == 1
        slot.give_back()

    holds()
    assert slots(client) == 0


def test_a_server_that_is_away_does_not_end_the_work(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def refuse(*args: object, **kwargs: object) -> Any:
                raise httpx.ConnectError("refused")

            return refuse

    slot = gpu._Slot(Away())  # type: ignore[arg-type]
    slot.lease = UUID(int=1)
    slot.renew()
    slot.give_back()
    assert caplog.text.count("refused") == 2


# servers and commands


def test_a_leashed_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\nfrom flows.leash import leashed\n"
        f"command = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(99)']\n"
        f"with leashed(command, pathlib.Path({str(tmp_path / 'log')!r}), {{}}):\n    time.sleep(99)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tiny.REPOSITORY)
    child = int(_eventually(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip()))
    parent.kill()
    parent.wait()
    assert _eventually(lambda: not psutil.pid_exists(child))


def test_a_configured_server_that_is_away_is_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.ANSWER_SECONDS + 2 < 15
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    dead = server.api_url(server.free_port())
    unavailable = pytest.raises(ServiceError, match=re.escape(dead))
    with temporary_settings({PREFECT_API_URL: dead}), unavailable, server.prefect_api(tmp_path / "log"):
        pass


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command, log = [sys.executable, "-c", "raise SystemExit('no such data base')"], tmp_path / "log"
    with leashed(command, log, {}) as child, pytest.raises(ServiceError, match="no such data base"):
        server.wait_until(lambda: False, child, "Prefect", log)


def test_bad_parameters_are_refused_before_a_server_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command.main(["--set", "ppo.cycles=0", "--set", "ppo.cycels=1"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert "params.yaml:ppo.cycles" in told.err
    assert "params.yaml:ppo.cycels" in told.err
    assert "Traceback" not in told.err


def test_a_port_that_is_taken_names_the_holder() -> None:
    with socket.socket() as holder:
        holder.bind((server.HOST, 0))
        holder.listen()
        taken = ui.Dashboard("MLflow", f"http://{server.HOST}:{holder.getsockname()[1]}", "/health", ["mlflow"])
        with pytest.raises(ResourceError, match=rf"process {os.getpid()}.*--mlflow-port"):
            ui._check(taken)


# schedules


def test_the_deployment_has_a_form_with_bounds_and_a_schedule_that_follows_params_yaml(
    client: SyncPrefectClient,
) -> None:
    made = client.read_deployment(serve.deployment("0 2 * * *", "Europe/Berlin").apply())
    params = dump_params(load_params(Workspace.here().params))
    assert made.parameters == {"params": params}
    (schedule,) = made.schedules
    assert (schedule.schedule.cron, schedule.active, schedule.parameters) == ("0 2 * * *", True, {"params": None})
    assert made.concurrency_options.collision_strategy.value == "ENQUEUE"
    form = made.parameter_openapi_schema["definitions"]["Params"]["properties"]
    assert list(form) == ["seed", *STAGES], "sections are called as in params.yaml"
    answer = httpx.post(
        f"{client.api_url}deployments/{made.id}/create_flow_run",
        json={"parameters": {"params": params | {"ppo": params["ppo"] | {"cycles": 0}}}},
    )
    assert answer.status_code == httpx.codes.CONFLICT
    assert "params.ppo.cycles" in answer.text


def test_prefect_yaml_names_what_there_is() -> None:
    deployments = yaml.safe_load((tiny.REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))
    (step,) = deployments["build"][0]
    assert step == f"{serve.__name__}.{serve.default_parameters.__name__}"
    (deployment,) = deployments["deployments"]
    assert deployment["entrypoint"] == f"{pipeline.__name__}.{pipeline.align.fn.__name__}"
    assert set(deployment["parameters"]) <= set(pipeline.align.parameters.properties)


# what people see


def test_pictures_travel_inside_the_markdown(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_bytes(b"<svg/>")
    text = "![curve](a.svg) ![web](https://x/y.png) ![gone](b.png)"
    shown = artifacts.with_pictures(text, tmp_path)
    assert shown == "![curve](data:image/svg+xml;base64,PHN2Zy8+) ![web](https://x/y.png) ![gone](b.png)"


def test_the_last_screen_says_what_improved_and_where_to_look(place: Workspace) -> None:
    written = {
        "evaluate": {
            "n": 400,
            "judge_win_rate": 0.8,
            "judge_win_rate_low": 0.75,
            "judge_win_rate_high": 0.85,
            "kl": 9.0,
        },
        "ppo": {"cycles": 8, "stopped_by": "target", "result_cycle": 7},
        "register": {"model_name": "m", "model_version": 3, "gate": "failed", "breached": ["max_kl"]},
    }
    place.metrics("ppo").parent.mkdir()
    for stage, metrics in written.items():
        place.metrics(stage).write_text(json.dumps(metrics), encoding="utf-8")
    console = Console(width=80, record=True, file=io.StringIO())
    closing.show_result(place, console)
    screen = console.export_text()
    for piece in (
        "400 test prompts",
        "80.0%",
        "75.0% to 85.0%",
        "target reached",
        "max_kl",
        "version 3",
        "report.html",
    ):
        assert piece in screen


# the real pipeline, in processes of its own


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny.tiny_workspace(tmp_path_factory.mktemp("checkout") / "tiny")


def start(checkout: Workspace, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.align"],
        cwd=checkout.root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if re.search(pattern, line):
            return told
    raise AssertionError(f"it ended without {pattern}:\n{told}")


@pytest.mark.parametrize(
    ("how", "code", "state"), [("SIGTERM", 143, "Crashed"), ("SIGINT", 130, "Crashed"), ("cancel", 143, "Cancelled")]
)
def test_a_run_that_is_told_to_end_ends_and_frees_all(
    how: str, code: int, state: str, checkout: Workspace, api: str, client: SyncPrefectClient
) -> None:
    process = start(checkout, PREFECT_API_URL=api)
    read_until(process, "Beginning flow run")
    run = _eventually(
        lambda: next(
            (
                r
                for r in client.read_flow_runs()
                if r.parameters.get("workspace") == str(checkout.root)
                and r.state_type == StateType.RUNNING
                and "proximal.pid" in r.labels
            ),
            None,
        )
    )
    children = psutil.Process(process.pid).children(recursive=True)
    if how == "cancel":
        client.set_flow_run_state(run.id, prefect.states.Cancelling())
    else:
        process.send_signal(getattr(signal, how))
    told, _ = process.communicate(timeout=30)
    assert process.returncode == code, told
    assert client.read_flow_run(run.id).state_name == state
    assert not any(child.is_running() for child in children)
    with tasks.versioning.workspace_lock(checkout):
        pass


def test_killed_in_training_it_leaves_no_server_and_continues(checkout: Workspace, tmp_path: Path) -> None:
    """With a server of its own. Then it all is up to date, for DVC too, and nothing runs again."""
    environment = {"PREFECT_HOME": str(tmp_path / "home")}
    killed = start(checkout, **environment)
    told = read_until(killed, "Task run 'ppo cycle 1' - Finished in state Completed")
    url = re.search(r"(http://[\d.:]+)/runs", told)
    assert url is not None
    assert server.is_healthy(f"{url[1]}/api")
    killed.kill()
    killed.wait()
    assert _eventually(lambda: not server.is_healthy(f"{url[1]}/api"))

    again = start(checkout, **environment)
    told, _ = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert "marked Crashed" in told
    assert "ppo cycle 2" in told
    assert "ppo cycle 1" not in told
    assert "registered" in told
    assert all(tasks.versioning.up_to_date(stage, checkout) for stage in STAGES)

    third = start(checkout, **environment)
    told, _ = third.communicate(timeout=120)
    assert third.returncode == 0, told
    assert told.count("Finished in state Skipped") == len(STAGES)
    assert not (tmp_path / "home" / "storage").exists()


def _eventually(condition: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value
