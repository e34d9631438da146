"""A scratch repository of two stages under git and DVC, in which both have run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from tiny import tiny_params

from tasks.versioning import stage_guard
from tasks.workspace import Workspace

GRAPH = """
stages:
  ingest:
    cmd: mkdir -p data/canonical metrics && cp data/own/text data/canonical/text && echo {} > metrics/ingest.json
    params: [seed]
    deps: [data/own]
    outs: [data/canonical]
    metrics: [metrics/ingest.json: {cache: false}]
  ppo:
    cmd: >-
      mkdir -p models/policy && cat tasks/ppo.py data/canonical/text > models/policy/weights
      && echo '{"mlflow_run_id":"r1","model_version":3}' > metrics/ppo.json
    params: [ppo]
    deps: [data/canonical, tasks/ppo.py]
    outs: [models/policy]
    metrics: [metrics/ppo.json: {cache: false}]
"""
FILES = {
    "dvc.yaml": GRAPH,
    "params.yaml": yaml.safe_dump(tiny_params() | {"evaluate": {}}),
    "data/own/text": "good film\n",
    "tasks/ppo.py": "step = 1\n",
    ".gitignore": "/work/\n/data/canonical\n/models/\n",
    ".dvcignore": "/work/\n",
}


def git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout


def dvc(root: Path, *command: str) -> str:
    called = [sys.executable, "-m", "dvc", *command]
    return subprocess.run(called, cwd=root, check=True, capture_output=True, text=True).stdout


def execute(stage: str, place: Workspace) -> None:
    """What `python -m tasks STAGE` is in the real graph."""
    command = yaml.safe_load(GRAPH)["stages"][stage]["cmd"]
    subprocess.run(command, shell=True, cwd=place.root, check=True)


def guarded(stage: str, place: Workspace, during: Callable[[], object] = lambda: None) -> None:
    with stage_guard(stage, place):
        execute(stage, place)
        during()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def committed(place: Workspace) -> tuple[str, list[str]]:
    """What DVC believes: its lock file and its run cache."""
    return (place.root / "dvc.lock").read_text(), sorted(map(str, (place.root / ".dvc/cache/runs").rglob("*")))


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Workspace(tmp_path_factory.mktemp("scratch") / "checkout")
    for name, text in FILES.items():
        (place.root / name).parent.mkdir(parents=True, exist_ok=True)
        (place.root / name).write_text(text, encoding="utf-8")
    git(place.root, "init", "--quiet", "--initial-branch=main")
    git(place.root, "config", "user.name", "Tiny")
    git(place.root, "config", "user.email", "tiny@example.com")
    Repo.init(str(place.root)).close()
    git(place.root, "add", "--all")
    git(place.root, "commit", "--quiet", "--message", "scratch")
    guarded("ingest", place)
    guarded("ppo", place)
    return place.root


@pytest.fixture
def place(finished_once: Path, tmp_path: Path, records: list[tuple[Any, ...]]) -> Workspace:
    """A checkout of the test's own in which both stages have run under the guard."""
    return Workspace(shutil.copytree(finished_once, tmp_path / "checkout", symlinks=True))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """MLflow knows run r1 with version 3, and nothing else. The list holds what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def record_exists(_: Workspace, *record: Any) -> bool:
        asked.append(record)
        return record == ("r1", 3)

    monkeypatch.setattr("tasks.tracking.record_exists", record_exists)
    return asked
