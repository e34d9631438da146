"""Hand-over to DVC in a scratch repository of two stages: nothing is committed that did not happen."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from scratch import change, committed, dvc, execute, guarded

from tasks import versioning
from tasks.errors import ConfigError, DataError, IntegrityError
from tasks.params import load_params
from tasks.versioning import source_digests, stage_guard, up_to_date
from tasks.workspace import Workspace

pytest_plugins = ["scratch"]


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
        versioning.worktree(place, load_params(place.params), "other")
