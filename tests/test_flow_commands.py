"""Around the flow: the GPU slot, servers and ports, deployments and their form, the last screen."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import prefect
import pytest
import tiny
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from waiting import eventually, has_ended

from flows import align as command
from flows import closing, gpu, lifecycle, pipeline, serve, server, ui
from flows.leash import leashed
from tasks.errors import ResourceError, ServiceError
from tasks.params import dump_params, load_params
from tasks.stages import STAGES
from tasks.workspace import Workspace

pytest_plugins = ["flow_server"]


@pytest.mark.fault("14: the lease of the GPU slot is lost", expected="taken again; training goes on")
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
        assert _taken(client) == 1
        slot.give_back()

    holds()
    assert _taken(client) == 0


@pytest.mark.fault("14: Prefect is away when the lease is renewed", expected="logged; training goes on")
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


def _taken(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name(gpu.SLOT).active_slots


def test_a_signal_that_meets_a_finalizer_arrives_nevertheless() -> None:
    class Finalized:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with pytest.raises(KeyboardInterrupt), lifecycle.signals_arrive():
            time.sleep(5 if Finalized() else 0)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.fault("32: the parent of a server is killed", expected="the server ends")
def test_a_leashed_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\nfrom flows.leash import leashed\n"
        f"command = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(99)']\n"
        f"with leashed(command, pathlib.Path({str(tmp_path / 'log')!r}), {{}}):\n    time.sleep(99)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tiny.REPOSITORY)
    child = int(eventually(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip()))
    parent.kill()
    parent.wait()
    assert eventually(lambda: has_ended(child))


@pytest.mark.fault("14: Prefect does not answer at the start", expected="exit 9 within 12 s, address named")
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
        taken = ui.Dashboard("MLflow", f"http://{server.HOST}:{holder.getsockname()[1]}", "", ["mlflow"])
        with pytest.raises(ResourceError, match=rf"process {os.getpid()}.*--mlflow-port"):
            ui._check(taken)


def test_the_deployment_has_a_form_with_bounds_and_a_schedule_that_follows_params_yaml(
    client: SyncPrefectClient,
) -> None:
    made = client.read_deployment(serve.deployment("0 2 * * *", "Europe/Berlin", review=True).apply())
    params = dump_params(load_params(Workspace.here().params))
    assert made.parameters == {"params": params, "review": True}
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


def test_the_last_screen_says_what_improved_and_where_to_look(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
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
