"""An MLflow database for a test: its tables are made once a session, because the migrations take seconds."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from tasks import tracking
from tasks.workspace import Workspace


def new_store(workspace: Workspace) -> Workspace:
    """Give the workspace a database with MLflow's tables and nothing in them."""
    shutil.copy(Path(_made_once().name) / "mlflow.db", workspace.main_root / "mlflow.db")
    return workspace


@functools.cache
def _made_once() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    tracking.connect(Workspace(Path(folder.name))).search_experiments()
    return folder
