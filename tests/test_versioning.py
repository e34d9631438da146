"""Hand-over to DVC in a scratch repository of two stages: nothing is committed that did not happen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from tiny import tiny_params

from tasks import versioning
from tasks.errors import ConfigError, DataError, IntegrityError, Locked
from tasks.params import load_params
from tasks.versioning import source_digests, stage_guard, up_to_date
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

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
def place(finished_once: Path, tmp_path: Path) -> Workspace:
    """A checkout of the test's own in which both stages have run under the guard."""
    return Workspace(shutil.copytree(finished_once, tmp_path / "checkout", symlinks=True))


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """MLflow knows run r1 with version 3, and nothing else. The list holds what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def record_exists(_: Workspace, *record: Any) -> bool:
        asked.append(record)
        return record == ("r1", 3)

    monkeypatch.setattr("tasks.tracking.record_exists", record_exists)
    return asked


def test_after_a_guarded_run_dvc_has_nothing_to_do(place: Workspace) -> None:
    assert dvc(place.root, "status", "--json").strip() == "{}"
    assert up_to_date("ingest", place)
    assert up_to_date("ppo", place)
    assert dvc(place.root, "repro").count("didn't change, skipping") == 2


def test_after_dvc_repro_a_flow_has_nothing_to_do(place: Workspace) -> None:
    change(place.params, "seed: 5", "seed: 6")
    assert not up_to_date("ingest", place)
    dvc(place.root, "repro")
    assert up_to_date("ingest", place)
    assert up_to_date("ppo", place)


def test_the_working_directory_does_not_matter(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change(place.root / "tasks/ppo.py", "1", "2")
    guarded("ppo", place)
    assert up_to_date("ppo", place)


@pytest.mark.parametrize(
    ("path", "old", "new", "named"),
    [
        ("params.yaml", "cycles: 2", "cycles: 3", "params.yaml:ppo"),
        ("data/canonical/text", "good", "bad", "data/canonical"),
        ("tasks/ppo.py", "1", "2", "tasks/ppo.py"),
    ],
)
def test_an_input_that_changes_during_the_run_is_named_and_nothing_is_committed(
    place: Workspace, path: str, old: str, new: str, named: str
) -> None:
    believed = committed(place)
    with pytest.raises(IntegrityError, match=f"changed while it was used: {named} ") as refused:
        guarded("ppo", place, lambda: change(place.root / path, old, new))
    assert refused.value.exit_code == 4
    assert committed(place) == believed
    assert not up_to_date("ppo", place)


def test_an_input_that_changed_between_the_start_of_the_flow_and_the_stage_is_refused(place: Workspace) -> None:
    began = source_digests(place)
    change(place.root / "tasks/ppo.py", "1", "2")
    with pytest.raises(IntegrityError, match=r"tasks/ppo\.py"), stage_guard("ppo", place, began):
        pytest.fail("must not run")
    with stage_guard("ppo", place, source_digests(place)):
        execute("ppo", place)


def test_what_the_run_does_not_depend_on_may_change(place: Workspace) -> None:
    began = source_digests(place)
    with stage_guard("ppo", place, began):
        execute("ppo", place)
        change(place.params, "seed: 5", "seed: 6")
    assert up_to_date("ppo", place)
    assert not up_to_date("ingest", place)


def test_a_failed_stage_commits_nothing(place: Workspace) -> None:
    believed = committed(place)
    change(place.root / "tasks/ppo.py", "1", "2")
    with pytest.raises(ZeroDivisionError):
        guarded("ppo", place, lambda: 1 / 0)
    assert committed(place) == believed
    assert not up_to_date("ppo", place)


def test_a_stage_that_leaves_out_an_output_is_not_committed(place: Workspace) -> None:
    believed = committed(place)
    with pytest.raises(IntegrityError, match="models/policy"), stage_guard("ppo", place):
        shutil.rmtree(place.policy)
    assert committed(place) == believed


def test_a_missing_input_is_named(place: Workspace) -> None:
    shutil.rmtree(place.canonical)
    with pytest.raises(DataError, match="is missing: data/canonical"), stage_guard("ppo", place):
        pytest.fail("must not run")


def test_a_tracked_parameter_that_is_missing_is_named(place: Workspace) -> None:
    plain = yaml.safe_load(place.params.read_text())
    del plain["ppo"]
    place.params.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match="'ppo' are missing"), stage_guard("ppo", place):
        pytest.fail("must not run")


@pytest.mark.parametrize("lost", ["run", "version"])
def test_without_its_record_in_mlflow_a_stage_is_not_up_to_date(place: Workspace, lost: str) -> None:
    metrics = {"run": '{"mlflow_run_id": "gone"}', "version": '{"mlflow_run_id": "r1", "model_version": 4}'}[lost]
    with stage_guard("ppo", place):
        execute("ppo", place)
        place.metrics("ppo").write_text(metrics)
    assert dvc(place.root, "status", "--json").strip() == "{}"
    assert not up_to_date("ppo", place)


def test_mlflow_is_asked_only_where_a_record_is_named(place: Workspace, records: list[tuple[Any, ...]]) -> None:
    assert up_to_date("ingest", place)
    assert records == []
    assert up_to_date("ppo", place)
    assert records == [("r1", 3)]


def test_a_missing_output_is_not_up_to_date(place: Workspace) -> None:
    shutil.rmtree(place.policy)
    assert not up_to_date("ppo", place)


def test_a_linked_output_is_not_written_through_into_the_cache(place: Workspace) -> None:
    with Repo(str(place.root)) as repo:
        with repo.config.edit("local") as config:
            config["cache"]["type"] = ["hardlink"]
        shutil.rmtree(place.policy)
    dvc(place.root, "checkout")
    weights = place.policy / "weights"
    (cached,) = [f for f in (place.root / ".dvc/cache/files").rglob("*") if f.is_file() and f.samefile(weights)]
    before = cached.read_bytes()
    with stage_guard("ppo", place):
        execute("ppo", place)
        weights.write_text("trained anew")
    assert cached.read_bytes() == before


def test_a_dvc_command_at_work_is_waited_for(place: Workspace) -> None:
    code = f"""
import time
from dvc.repo import Repo
with Repo({str(place.root)!r}) as repo, repo.lock:
    print("held", flush=True)
    time.sleep(5)  # longer than DVC itself waits
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        started = time.monotonic()
        assert up_to_date("ppo", place)
        assert time.monotonic() - started > 3


def test_without_git_the_guard_works_and_a_worktree_is_refused(place: Workspace) -> None:
    shutil.rmtree(place.root / ".git")
    with Repo(str(place.root), uninitialized=True) as repo, repo.config.edit("local") as config:
        config["core"]["no_scm"] = True
    change(place.root / "tasks/ppo.py", "1", "2")
    guarded("ppo", place)
    assert up_to_date("ppo", place)
    with pytest.raises(ConfigError, match="git"):
        versioning.worktree(place, {}, "other")


def test_a_worktree_runs_only_what_its_parameters_change(place: Workspace) -> None:
    other = versioning.worktree(place, {"ppo": {"cycles": 7}}, "warm heron/1")
    assert other.root == place.root / "work/worktrees/warm-heron-1"
    assert load_params(other.params).ppo.cycles == 7
    assert up_to_date("ingest", other)
    assert not up_to_date("ppo", other)
    guarded("ppo", other)
    assert up_to_date("ppo", other)
    assert not (other.root / ".dvc/cache").exists()
    assert other.main_root == place.root
    assert up_to_date("ppo", place)
    assert "params.yaml" not in git(place.root, "status", "--short")


def test_a_worktree_spells_out_no_defaults(place: Workspace) -> None:
    everything = versioning.dump_params(load_params(place.params))
    everything["ppo"]["update"]["epochs"] = 9
    other = versioning.worktree(place, everything, "epochs")
    expected = yaml.safe_load(place.params.read_text())
    expected["ppo"]["update"]["epochs"] = 9
    assert yaml.safe_load(other.params.read_text()) == expected


def test_a_worktree_has_what_is_not_committed(place: Workspace) -> None:
    change(place.root / "tasks/ppo.py", "1", "2")
    (place.own_data / "more").write_text("fine film\n")
    other = versioning.worktree(place, {}, "run")
    assert (other.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert (other.own_data / "more").read_text() == "fine film\n"
    assert (place.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert git(place.root, "stash", "list") == ""


def test_a_worktree_that_is_there_already_is_brought_up_to_date_and_keeps_its_work(place: Workspace) -> None:
    other = versioning.worktree(place, {"ppo": {"cycles": 7}}, "run")
    (other.work / "ppo").mkdir()
    (other.work / "ppo/cycle").touch()
    (other.own_data / "stale").touch()
    change(place.root / "tasks/ppo.py", "1", "2")
    again = versioning.worktree(place, {"ppo": {"cycles": 8}}, "run")
    assert again == other
    assert load_params(again.params).ppo.cycles == 8
    assert (again.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert (again.work / "ppo/cycle").exists()
    assert not (again.own_data / "stale").exists()


def test_code_that_git_does_not_know_is_named(place: Workspace) -> None:
    (place.root / "tasks/new.py").touch()
    with pytest.raises(ConfigError, match=r"tasks/new\.py"):
        versioning.worktree(place, {}, "run")
    assert not (place.root / "work/worktrees").exists()


def test_impossible_parameters_are_refused(place: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.cycles"):
        versioning.worktree(place, {"ppo": {"cycles": 0}}, "run")


def test_a_worktree_in_which_a_run_is_at_work_is_left_alone(place: Workspace) -> None:
    other = versioning.worktree(place, {"ppo": {"cycles": 7}}, "run")
    with workspace_lock(other), pytest.raises(Locked, match=str(os.getpid())):
        versioning.worktree(place, {"ppo": {"cycles": 8}}, "run")
    assert load_params(other.params).ppo.cycles == 7
