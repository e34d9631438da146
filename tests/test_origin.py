"""The commit that a result names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.origin import made_by
from tasks.run_tags import git_tags
from tasks.workspace import SMALL_RESULTS, Workspace


def git(root: Path, *command: str) -> str:
    identity = ("-c", "user.name=Tiny", "-c", "user.email=tiny@example.com")
    called = ["git", *identity, *command]
    return subprocess.run(called, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with code and results in it."""
    for name in ("tasks/ppo.py", "metrics/ppo.json", "plots/cycles.csv", "dvc.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    return tmp_path


def test_results_leave_a_checkout_clean_and_code_does_not(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    for name in ("metrics/ppo.json", "plots/cycles.csv", "dvc.lock"):
        (checkout / name).write_text("2")
    assert len(git(checkout, "status", "--short").splitlines()) == len(SMALL_RESULTS)
    assert made_by(Workspace(checkout))["git commit"] == commit
    assert git_tags(checkout) == {"mlflow.source.git.commit": commit, "proximal.git.dirty": "false"}
    (checkout / "tasks/ppo.py").write_text("2")
    assert made_by(Workspace(checkout))["git commit"] == f"{commit}-dirty"
    assert git_tags(checkout) == {"mlflow.source.git.commit": commit, "proximal.git.dirty": "true"}


@pytest.mark.parametrize("initialised", [False, True])
def test_without_a_commit_none_is_named(tmp_path: Path, initialised: bool) -> None:
    if initialised:
        git(tmp_path, "init", "--quiet")
    assert made_by(Workspace(tmp_path))["git commit"] == "none"
    assert git_tags(tmp_path) == {}
