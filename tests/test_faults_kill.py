"""Killed at any point and begun again with the same command, a training is the one that was never killed.

Weights, optimiser, records and the history in MLflow are compared bit for bit; only what the clock says is left out.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from courses import course, differences
from killing import Stages

from tasks.workspace import Workspace

pytest_plugins = ["trainings"]

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
        "tensors written:3",  # the critic's
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
    "at the end": (
        "policy written beside:1",
        "policy in place:1",
        "critic written beside:1",
        "critic in place:1",
        "result recorded:1",
        "metrics written:1",
    ),
}
"""Deaths that one training suffers, one after another, before it is left alone: where, and which time it is there.

Two cycles of two iterations of two epochs of two minibatches. A process that continues counts from its own beginning.
"""


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
    server: Stages, training: Workspace, uninterrupted: dict[str, Any], seen: Callable[[str], None]
) -> None:
    assert differences(die_and_finish(QUICK, server, training), uninterrupted) == []
    seen(f"killed {len(QUICK)} times, equal")


@pytest.mark.fault_slow
@pytest.mark.parametrize("where", [
    pytest.param(where, marks=pytest.mark.fault(f"1-7: SIGKILL {where}, at each of {len(kills)} points",
                                                expected="equal to the run that was never killed"))
    for where, kills in CHAINS.items()
])  # fmt: skip
def test_killed_at_every_point(
    where: str, server: Stages, training: Workspace, uninterrupted: dict[str, Any], seen: Callable[[str], None]
) -> None:
    assert differences(die_and_finish(CHAINS[where], server, training), uninterrupted) == []
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
