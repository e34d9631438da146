"""Fixtures that every test may use, and guards: nothing leaves this machine, nothing is recorded elsewhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything that reads them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and threads that wait for each other cost a great deal.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from tasks import environment

environment.prepare()

import pytest  # noqa: E402

# Helpers with fixtures that test modules import before pytest does.
pytest.register_assert_rewrite("ingested", "registered", "runs", "scratch", "stores", "vllm_like")

import tiny  # noqa: E402

from tasks.params import Params, load_params  # noqa: E402
from tasks.workspace import Workspace  # noqa: E402

pytest_plugins = ["faults"]


@pytest.fixture(autouse=True)
def _no_tracking_server() -> Iterator[None]:
    """A tracking server that one test named never receives what the next one records.

    mlflow.set_tracking_uri puts its server into the environment, which processes started by later tests would inherit.
    """
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


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


@pytest.fixture
def own(tmp_path: Path) -> Workspace:
    """A workspace that has a folder for data of the user's own, and nothing else."""
    workspace = Workspace(tmp_path / "checkout")
    workspace.own_data.mkdir(parents=True)
    return workspace


@pytest.fixture
def get(own: Workspace, tmp_path: Path) -> Callable[..., Any]:
    """fetch() into the workspace `own`, with the fixed arguments filled in."""
    from tasks.data.sources import fetch  # brings `datasets`, which takes seconds and few tests need

    (tmp_path / "scratch").mkdir()
    return functools.partial(fetch, workspace=own, scratch=tmp_path / "scratch")
