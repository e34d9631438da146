"""MLflow and Prefect unreachable at the start, and lost in mid-run: nothing is lost, nothing is recorded twice."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny
from courses import course, differences
from killing import Stages
from waiting import eventually

from flows.leash import leashed
from flows.server import HOST, api_url, free_port, is_healthy, prefect_command, prefect_environment, wait_until
from tasks import tracking
from tasks.processes import PID, STARTED, is_alive, process_tags
from tasks.stages import STAGES
from tasks.versioning import up_to_date
from tasks.workspace import Workspace

pytest_plugins = ["trainings"]


def stage(checkout: Workspace) -> list[str]:
    return ["ppo", "--workspace", str(checkout.root)]


@contextmanager
def mute_server() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(50)
        yield f"http://{HOST}:{listening.getsockname()[1]}"


@contextmanager
def dead_server() -> Iterator[str]:
    yield f"http://{HOST}:{free_port()}"


@pytest.mark.fault("12: MLflow does not answer at the start", expected="exit 9 within 15 s, address named")
@pytest.mark.parametrize("away", [dead_server, mute_server])
def test_mlflow_away_at_the_start_is_told_in_time(
    away: Callable[[], Any], server: Stages, training: Workspace, seen: Callable[[str], None]
) -> None:  # fmt: skip
    log = training.root / "log"
    assert 2 * tracking.PROBE_SECONDS < 15, "to connect, and to get an answer"
    with away() as url:
        began = time.monotonic()
        assert server.run(stage(training), log, env={"MLFLOW_TRACKING_URI": url}) == 9
        seconds = time.monotonic() - began
    told = log.read_text().splitlines()[-1]
    assert told.startswith(f"ServiceError: {url} — MLflow does not answer")
    assert not list(training.runs.rglob("cycle_*"))
    assert seconds < 60, "whatever else the machine is doing"
    seen(f"exit 9 after {seconds:.0f} s, address named")


@pytest.mark.fault("32: SIGTERM to the stage in training", expected="exit 143, MLflow run KILLED; it continues")
def test_a_terminated_stage_closes_its_run(server: Stages, training: Workspace, seen: Callable[[str], None]) -> None:
    log = training.root / "log"
    pid = server.begin(stage(training), log, "iteration done:1:SIGTERM")
    assert server.end() == 143, log.read_text()
    client = tracking.connect(training)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["KILLED"]
    assert not psutil.pid_exists(pid)
    assert server.run(stage(training), log) == 0, log.read_text()
    assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"]
    seen("exit 143, KILLED, then FINISHED")


@pytest.mark.fault("a run left RUNNING by a process that is dead but not buried", expected="counts as dead")
def test_a_zombie_is_dead() -> None:
    """As where the first process of a container buries nobody."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = psutil.Process(process.pid).create_time()
        tags = process_tags() | {PID: str(process.pid), STARTED: str(began)}
        assert is_alive(tags)
        process.kill()
        assert eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert not is_alive(tags)
    assert not is_alive(tags)


@pytest.mark.fault("a run in MLflow begun and left in the same moment", expected="KILLED when another one opens")
def test_a_run_says_whose_it_is_from_its_first_moment(
    server: Stages, training: Workspace, seen: Callable[[str], None]
) -> None:
    log = training.root / "log"
    assert server.run(stage(training), log, "run created:1") == -signal.SIGKILL
    other = [*stage(training), "--set", "seed=6", "--set", "ppo.cycles=1"]
    assert server.run(other, log) == 0, log.read_text()
    client = tracking.connect(training)
    runs = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]
    seen("KILLED")


@contextmanager
def mlflow_server(home: Path, port: int) -> Iterator[psutil.Process]:
    store, files = f"sqlite:///{home / 'mlflow.db'}", (home / "mlartifacts").as_uri()
    options = ["--host", HOST, "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *options, "--backend-store-uri", store]
    with leashed([*command, "--artifacts-destination", files], home / "mlflow.log", {}) as child:
        wait_until(lambda: is_healthy(f"http://{HOST}:{port}"), child, "MLflow", home / "mlflow.log")
        yield psutil.Process(child.pid)


@pytest.mark.fault_slow
@pytest.mark.fault("13: MLflow dies in mid-run", expected="training ends, exit 9; delivered later, once")
def test_mlflow_lost_in_mid_run_gets_everything_later_once(
    server: Stages,
    training: Workspace,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    seen: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, port, log = tmp_path / "mlflow", free_port(), training.root / "log"
    home.mkdir()
    (training.root / "mlflow.db").rename(home / "mlflow.db")
    environment = {"MLFLOW_TRACKING_URI": f"http://{HOST}:{port}"}
    with mlflow_server(home, port):
        pid = server.begin(stage(training), log, "cycle begun:2:SIGSTOP", environment)
        assert eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 120), log.read_text()
    os.kill(pid, signal.SIGCONT)  # the server is gone
    assert server.end() == 9, log.read_text()
    assert len(list(training.runs.glob("*/cycle_*"))) == 2, "training went on to its end"
    with mlflow_server(home, port):
        assert server.run(stage(training), log, env=environment) == 0, log.read_text()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
        assert differences(course(training), uninterrupted) == []
    seen("2 of 2 cycles trained, exit 9; after the next start its history equals that of an undisturbed run")


@pytest.mark.fault_slow
@pytest.mark.fault("14: the Prefect server dies in mid-run", expected="work done and committed; exit 9, address named")
def test_prefect_lost_in_mid_run_does_not_end_the_work(tmp_path: Path, seen: Callable[[str], None]) -> None:
    checkout = tiny.tiny_workspace(tmp_path / "checkout")
    port, home = free_port(), tmp_path / "home"
    url, env = api_url(port), {**prefect_environment(port), "PREFECT_HOME": str(home)}
    environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    command = [sys.executable, "-m", "flows.align"]
    with leashed(prefect_command(port), tmp_path / "server.log", env) as child:
        wait_until(lambda: is_healthy(url), child, "Prefect", tmp_path / "server.log")
        run = subprocess.Popen(
            command, cwd=checkout.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert run.stdout is not None
        for line in run.stdout:
            if re.search("Task run 'ppo cycle 1' - Finished", line):
                break
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/health")
    told, _ = run.communicate(timeout=300)
    assert run.returncode == 9, told
    assert f"ServiceError: {url} — Prefect went away" in told
    assert all(up_to_date(name, checkout) for name in STAGES), "all was done and committed"
    seen("every stage done and committed, exit 9, address named")
