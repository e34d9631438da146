"""Fixtures that every test may use, and guards: nothing leaves this machine, nothing is recorded elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything that reads them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and threads that wait for each other cost a great deal.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from tasks import environment

environment.prepare()

import pytest  # noqa: E402
import tiny  # noqa: E402

from tasks.params import Params, load_params  # noqa: E402
from tasks.workspace import Workspace  # noqa: E402

pytest_plugins = ["faults"]


@pytest.fixture(autouse=True)
def _no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking server that one test named never receives what the next one records."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy; read only."""
    return tiny.tiny_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny judge; read only."""
    return tiny.tiny_judge(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A tiny workspace of the test's own, nothing run in it yet."""
    return tiny.tiny_workspace(tmp_path / "checkout")


@pytest.fixture
def params(workspace: Workspace) -> Params:
    """The parameters of `workspace`."""
    return load_params(workspace.params)
