"""Fixtures: a training to kill, what runs its stage, and the undisturbed one that it is compared with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from courses import course
from killing import Stages, stages
from stores import new_store

from tasks.params import load_params
from tasks.stages import run_stage
from tasks.workspace import Workspace


def before_ppo(root: Path, **ppo: Any) -> Workspace:
    """A tiny checkout whose ppo stage may begin; two cycles of two iterations unless `ppo` says otherwise."""
    changes: dict[str, Any] = {"iterations": 2, "keep_states": 1, "update": {"epochs": 2}}
    changes["reward"] = {"kl_target": 1.0, "kl_horizon": 100}
    workspace = new_store(tiny.tiny_workspace(root, {"ppo": changes | ppo}))
    params = load_params(workspace.params)
    run_stage("ingest", params, workspace)
    run_stage("reward_model", params, workspace)
    return workspace


def copied(ready: Workspace, folder: Path) -> Workspace:
    """A copy for one training."""
    shutil.copytree(ready.root, folder / "checkout")
    return Workspace(folder / "checkout")


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose ppo stage may begin; read only."""
    return before_ppo(tmp_path_factory.mktemp("ready") / "checkout")


@pytest.fixture
def training(ready: Workspace, tmp_path: Path) -> Workspace:
    """A copy of `ready` for one test."""
    return copied(ready, tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[Stages]:
    """Runs stages in processes that can be killed."""
    with stages() as running:
        yield running


@pytest.fixture(scope="session")
def uninterrupted(ready: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The course of the command itself: `python -m tasks ppo`, in a process of its own."""
    workspace = copied(ready, tmp_path_factory.mktemp("unharmed"))
    command = [sys.executable, "-m", "tasks", "ppo", "--workspace", str(workspace.root)]
    done = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return course(workspace)
