"""The lock on a workspace, between real processes; and stages that do not outlive the `dvc repro` that runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import REPOSITORY
from waiting import eventually, has_ended

from tasks.errors import Locked
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

HOLD = """
import sys, time
from pathlib import Path
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock
with workspace_lock(Workspace(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
SLOW_STAGE = """
import os, sys, time
from pathlib import Path
from tasks.__main__ import _end_cleanly
_end_cleanly()
try:
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
finally:
    Path("unwound").touch()
"""


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def hold(place: Workspace, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(place.root), str(seconds)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault("21: a second run in the workspace", expected="exit 6 within 2 s, holder named")
def test_a_second_run_is_refused_at_once_and_told_who_holds_the_workspace(place: Workspace) -> None:
    with hold(place, 60) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        with (
            pytest.raises(Locked, match=rf"process {holder.pid} on .+ since 20") as refused,
            workspace_lock(place),
        ):
            pass
        assert time.monotonic() - started < 2
        assert refused.value.exit_code == 6
        holder.kill()


@pytest.mark.fault("21: the holder of the workspace is killed", expected="the workspace is free at once")
def test_sigkill_frees_the_lock(place: Workspace) -> None:
    with hold(place, 60) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
    with workspace_lock(place):
        assert json.loads(place.lock_file.read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_the_lock_is_free_after_the_block_also_on_an_error(place: Workspace) -> None:
    with pytest.raises(KeyError), workspace_lock(place):
        raise KeyError
    with workspace_lock(place):
        pass


def test_what_a_holder_starts_works_under_its_lock(place: Workspace) -> None:
    with workspace_lock(place), hold(place, 0) as child:
        assert child.wait() == 0


def test_a_second_run_in_the_same_process_is_refused(place: Workspace) -> None:
    with workspace_lock(place), pytest.raises(Locked, match="holds this workspace"), workspace_lock(place):
        pass


@pytest.mark.fault("21: a stage by hand while a run is at work", expected="exit 6, holder named")
def test_a_stage_started_by_hand_exits_with_6(place: Workspace) -> None:
    with hold(place, 60) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        command = [sys.executable, "-m", "tasks", "validate", "--workspace", str(place.root)]
        stage = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        holder.kill()
    assert stage.returncode == 6
    assert f"process {holder.pid}" in stage.stderr


@pytest.mark.fault("33: dvc repro is ended or killed", expected="its stage ends too, its record closed")
@pytest.mark.parametrize(
    ("shell", "how"),
    [
        ("/bin/bash", signal.SIGTERM),
        ("/bin/bash", signal.SIGKILL),
        ("/bin/sh", signal.SIGKILL),
        (None, signal.SIGKILL),
    ],
)
def test_a_stage_ends_when_dvc_does(tmp_path: Path, shell: str | None, how: signal.Signals) -> None:
    """DVC runs a stage through $SHELL, else /bin/sh, and some of them stay between the two."""
    (tmp_path / "slow.py").write_text(SLOW_STAGE)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{slow: {{cmd: {sys.executable} slow.py}}}}")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "SHELL"}
    environment |= {"PYTHONPATH": str(REPOSITORY)} | ({"SHELL": shell} if shell else {})
    with subprocess.Popen([*dvc, "repro"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as repro:
        written = tmp_path / "pid"
        stage = int(eventually(lambda: written.exists() and written.read_text(), 60))
        repro.send_signal(how)
    assert eventually(lambda: has_ended(stage), 60)
    assert (tmp_path / "unwound").exists()
