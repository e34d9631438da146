"""The whole command on tiny models: terminated, interrupted, cancelled, killed, continued, and with nothing to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import prefect
import psutil
import pytest
import tiny
from prefect.client.orchestration import SyncPrefectClient
from waiting import eventually, has_ended

from flows import server
from tasks.processes import PID
from tasks.stages import STAGES
from tasks.versioning import up_to_date
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

pytest_plugins = ["flow_server"]


def start(checkout: Workspace, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.align"],
        cwd=checkout.root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores SIGINT, and hands that down: the command here is one in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if re.search(pattern, line):
            return told
    raise AssertionError(f"it ended without {pattern}:\n{told}")


@pytest.mark.fault(
    "32: SIGTERM, SIGINT, Cancel", expected="exit 143, 130, 143; state recorded, no process left, lock free"
)
@pytest.mark.parametrize(
    ("how", "code", "state"), [("SIGTERM", 143, "Crashed"), ("SIGINT", 130, "Crashed"), ("cancel", 143, "Cancelled")]
)
def test_a_run_that_is_told_to_end_ends_and_frees_all(
    how: str, code: int, state: str, workspace: Workspace, api: str, client: SyncPrefectClient
) -> None:
    process = start(workspace, PREFECT_API_URL=api)
    read_until(process, "Beginning flow run")
    # The run has said which process it is once the flow itself runs.
    run = eventually(lambda: next((r for r in client.read_flow_runs() if r.labels.get(PID) == str(process.pid)), None))
    children = psutil.Process(process.pid).children(recursive=True)
    if how == "cancel":
        client.set_flow_run_state(run.id, prefect.states.Cancelling())
    else:
        process.send_signal(getattr(signal, how))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert client.read_flow_run(run.id).state_name == state
    assert all(has_ended(child.pid) for child in children)
    with workspace_lock(workspace):
        pass


@pytest.mark.fault(
    "32: the whole command is killed in training", expected="its server ends; the same command continues"
)
def test_killed_in_training_it_leaves_no_server_and_continues(tmp_path: Path) -> None:
    """With a server of its own. Then it all is up to date, for DVC too, and nothing runs again."""
    checkout = tiny.tiny_workspace(tmp_path / "checkout")
    environment = {"PREFECT_HOME": str(tmp_path / "home")}
    killed = start(checkout, **environment)
    told = read_until(killed, "Task run 'ppo cycle 1' - Finished in state Completed")
    url = re.search(r"(http://[\d.:]+)/runs", told)
    assert url is not None
    assert server.is_healthy(f"{url[1]}/api")
    killed.kill()
    killed.wait()
    assert eventually(lambda: not server.is_healthy(f"{url[1]}/api"))

    again = start(checkout, **environment)
    told, _ = again.communicate(timeout=1200)
    assert again.returncode == 0, told
    assert "marked Crashed" in told
    assert "ppo cycle 2" in told
    assert "ppo cycle 1" not in told
    assert "registered" in told
    assert all(up_to_date(stage, checkout) for stage in STAGES)

    third = start(checkout, **environment)
    told, _ = third.communicate(timeout=120)
    assert third.returncode == 0, told
    assert told.count("Finished in state Skipped") == len(STAGES)
    assert not (tmp_path / "home" / "storage").exists()
