"""Killed at any point and begun again with the same command, a training is the one that was never killed.

Weights, optimiser, records and the history in MLflow are compared bit for bit; only what the clock says is left out.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from courses import course, differences
from killing import REPOSITORY, Stages, stages
from stores import new_store

from tasks.params import load_params
from tasks.stages import run_stage
from tasks.workspace import Workspace

QUICK = ("optimiser stepped:10", "all synced:1", "saved:1", "model uploaded:1")
"""One death in each part: training, checkpoint, between its two halves, record."""
CHAINS = {
    "in the first cycle": (
        "run created:1",
        "run opened:1",
        "gradient computed:1",
        "iteration done:1",
        "file digested:1",
        "tensors written:2",
        "old states removed:2",  # the cycle is there, MLflow was not told
    ),
    "in the second cycle": (
        "cycle begun:2",
        "sampled:1",
        "scored:1",
        "rolled out:1",
        "advantages estimated:2",
        "gradient computed:2",
        "optimiser stepped:1",  # mid-epoch
        "optimiser stepped:2",  # between epochs
        "iteration done:2",
        "dev prompts answered:2",
    ),
    "in the checkpoint": (
        "save begun:3",
        "tensors written:1",
        "manifest written:1",
        "file synced:2",
        "all synced:1",
        "renamed:1",
        "saved:1",
        "tensors written:2",
        "all synced:2",
        "renamed:2",  # the cycle is there
        "old state half removed:1",
    ),
    "in the record": (
        "model created:1",
        "model uploaded:1",
        "model finalised:1",
        "model linked:1",
        "figures recorded:1",
        "cycle recorded:2",
    ),
    "at the end": ("policy written beside:1", "policy in place:1", "result recorded:1", "metrics written:1"),
}
"""Deaths that one training suffers, one after another, before it is left alone: where, and which time it is there.

Two cycles of two iterations of two epochs of two minibatches. A process that continues counts from its own beginning.
"""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose ppo stage may begin."""
    changes: dict[str, Any] = {"ppo": {"iterations": 2, "keep_states": 1, "update": {"epochs": 2}}}
    changes["ppo"]["reward"] = {"kl_target": 1.0, "kl_horizon": 100}
    workspace = new_store(tiny.tiny_workspace(tmp_path_factory.mktemp("ready") / "checkout", changes))
    params = load_params(workspace.params)
    run_stage("ingest", params, workspace)
    run_stage("reward_model", params, workspace)
    return workspace


@pytest.fixture(scope="module")
def server() -> Iterator[Stages]:
    with stages() as running:
        yield running


@pytest.fixture(scope="module")
def uninterrupted(ready: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command itself leaves: `python -m tasks ppo`, in a process of its own."""
    workspace = copy(ready, tmp_path_factory.mktemp("unharmed"))
    command = [sys.executable, "-m", "tasks", "ppo", "--workspace", str(workspace.root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return course(workspace)


@pytest.fixture
def workspace(ready: Workspace, tmp_path: Path) -> Workspace:
    return copy(ready, tmp_path)


def copy(ready: Workspace, folder: Path) -> Workspace:
    shutil.copytree(ready.root, folder / "checkout")
    return Workspace(folder / "checkout")


def die_and_finish(kills: Sequence[str], server: Stages, workspace: Workspace) -> dict[str, Any]:
    """The course of a training that was killed at each of `kills` and begun again with the same command."""
    log = workspace.root / "log"
    command = ["ppo", "--workspace", str(workspace.root)]
    for kill in kills:
        assert server.run(command, log, kill) == -signal.SIGKILL, f"{kill} was not reached\n{log.read_text()}"
    assert server.run(command, log) == 0, log.read_text()
    assert not list(workspace.runs.rglob("*writing*")), "what the dead were writing is swept"
    return course(workspace)


@pytest.mark.fault("1-7: SIGKILL in training, checkpoint and record", expected="equal to the run that was never killed")
def test_killed_and_begun_again_equals_never_killed(
    server: Stages, workspace: Workspace, uninterrupted: dict[str, Any], seen: Callable[[str], None]
) -> None:
    assert differences(die_and_finish(QUICK, server, workspace), uninterrupted) == []
    seen(f"killed {len(QUICK)} times, equal")


@pytest.mark.fault_slow
@pytest.mark.parametrize("where", [
    pytest.param(where, marks=pytest.mark.fault(f"1-7: SIGKILL {where}, at each of {len(kills)} points",
                                                expected="equal to the run that was never killed"))
    for where, kills in CHAINS.items()
])  # fmt: skip
def test_killed_at_every_point(
    where: str, server: Stages, workspace: Workspace, uninterrupted: dict[str, Any], seen: Callable[[str], None]
) -> None:
    assert differences(die_and_finish(CHAINS[where], server, workspace), uninterrupted) == []
    seen(f"killed {len(CHAINS[where])} times, equal: weights, optimiser, records, every point in MLflow")


def test_the_points_are_enough() -> None:
    assert len({kill.split(":")[0] for kills in CHAINS.values() for kill in kills}) >= 24


def test_the_comparison_sees_a_difference(uninterrupted: dict[str, Any]) -> None:
    mlflow = uninterrupted["mlflow"]
    twice = mlflow | {"dev/kl": [*mlflow["dev/kl"], mlflow["dev/kl"][-1]]}
    assert [step for step, _ in mlflow["dev/kl"]] == [1, 2]
    assert len(mlflow["policy-cycle-2"]) == 1
    assert differences(uninterrupted | {"mlflow": twice}, uninterrupted) == ["mlflow dev/kl"]
    assert differences(uninterrupted | {"cycles.csv": ""}, uninterrupted) == ["cycles.csv"]
    assert any(name.endswith("state_002/tensors.safetensors") for name in uninterrupted)
