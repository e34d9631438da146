"""MLflow for a test: a database whose tables are made once a session, as the migrations take seconds, and a cycle."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import tracking
from tasks.workspace import Workspace

RECORD = {"cycle": 1, "dev/judge_win_rate": 0.625, "train/kl": 2.5}
"""Of a cycle."""


@pytest.fixture
def home(tmp_path: Path, policy_folder: Path) -> Workspace:
    """A folder with a database and a base model."""
    workspace = new_store(Workspace(tmp_path))
    workspace.base_model.parent.mkdir()
    shutil.copytree(policy_folder, workspace.base_model)
    return workspace


def new_store(workspace: Workspace) -> Workspace:
    """Give the workspace a database with MLflow's tables and nothing in them."""
    shutil.copy(Path(_made_once().name) / "mlflow.db", workspace.main_root / "mlflow.db")
    return workspace


def trained_weights(workspace: Workspace, path: Path) -> Path:
    """The last layer of the base, moved: what a cycle trains."""
    tensors = load_file(workspace.base_model / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    last = {
        name: tensor + torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.3.")
    }
    save_file(last, path)
    return path


@functools.cache
def _made_once() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    tracking.connect(Workspace(Path(folder.name))).search_experiments()
    return folder
