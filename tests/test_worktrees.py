"""Worktrees for runs with parameters of their own, made from a scratch repository of two stages."""

from __future__ import annotations

import os

import pytest
import yaml
from scratch import change, git, guarded

from tasks import versioning
from tasks.errors import ConfigError, IntegrityError, Locked
from tasks.params import check_params, dump_params, load_params
from tasks.versioning import up_to_date
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

pytest_plugins = ["scratch"]


def test_a_worktree_runs_only_what_its_parameters_change(place: Workspace) -> None:
    other = versioning.worktree(place, load_params(place.params, ["ppo.cycles=7"]), "warm heron/1")
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
    everything = dump_params(load_params(place.params))
    everything["ppo"]["update"]["epochs"] = 9
    other = versioning.worktree(place, check_params(everything), "epochs")
    expected = yaml.safe_load(place.params.read_text())
    expected["ppo"]["update"]["epochs"] = 9
    assert yaml.safe_load(other.params.read_text()) == expected


def test_a_worktree_has_what_is_not_committed(place: Workspace) -> None:
    change(place.root / "tasks/ppo.py", "1", "2")
    (place.own_data / "more").write_text("fine film\n")
    other = versioning.worktree(place, load_params(place.params), "run")
    assert (other.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert (other.own_data / "more").read_text() == "fine film\n"
    assert (place.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert git(place.root, "stash", "list") == ""


def test_a_worktree_that_is_there_already_is_brought_up_to_date_and_keeps_its_work(place: Workspace) -> None:
    other = versioning.worktree(place, load_params(place.params, ["ppo.cycles=7"]), "run")
    (other.work / "ppo").mkdir()
    (other.work / "ppo/cycle").touch()
    (other.own_data / "stale").touch()
    change(place.root / "tasks/ppo.py", "1", "2")
    again = versioning.worktree(place, load_params(place.params, ["ppo.cycles=8"]), "run")
    assert again == other
    assert load_params(again.params).ppo.cycles == 8
    assert (again.root / "tasks/ppo.py").read_text() == "step = 2\n"
    assert (again.work / "ppo/cycle").exists()
    assert not (again.own_data / "stale").exists()


def test_code_that_git_does_not_know_is_named(place: Workspace) -> None:
    (place.root / "tasks/new.py").touch()
    with pytest.raises(ConfigError, match=r"tasks/new\.py"):
        versioning.worktree(place, load_params(place.params), "run")
    assert not (place.root / "work/worktrees").exists()


def test_a_reward_part_can_be_taken_away_in_a_worktree(place: Workspace) -> None:
    raw = yaml.safe_load(place.params.read_text())
    raw["ppo"]["reward"] = {"parts": {"human": {}, "short": {"rule": "length", "target": 8}}}
    place.params.write_text(yaml.safe_dump(raw))
    fewer = check_params(raw | {"ppo": raw["ppo"] | {"reward": {"parts": {"human": {}}}}})
    other = versioning.worktree(place, fewer, "fewer")
    assert load_params(other.params) == fewer


def test_parameters_that_cannot_be_written_down_are_named(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versioning, "_changed", lambda raw, now, wanted: raw)
    with pytest.raises(IntegrityError, match=r"says another thing than was asked for: ppo\.cycles —"):
        versioning.worktree(place, load_params(place.params, ["ppo.cycles=7"]), "run")


def test_a_worktree_in_which_a_run_is_at_work_is_left_alone(place: Workspace) -> None:
    other = versioning.worktree(place, load_params(place.params, ["ppo.cycles=7"]), "run")
    with workspace_lock(other), pytest.raises(Locked, match=str(os.getpid())):
        versioning.worktree(place, load_params(place.params, ["ppo.cycles=8"]), "run")
    assert load_params(other.params).ppo.cycles == 7
