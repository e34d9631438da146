"""The second door: `dvc repro` runs the real graph on tiny models. The tests go on from where the one before ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_workspace

from tasks.params import load_params
from tasks.stages import STAGES
from tasks.versioning import up_to_date, worktree
from tasks.workspace import Workspace

BIN = str(Path(sys.executable).parent)


def dvc(root: Path, *command: str) -> str:
    """What it prints. `python` in dvc.yaml is that of the environment, as after activating it."""
    called = subprocess.run(
        [sys.executable, "-m", "dvc", *command],
        cwd=root,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert called.returncode == 0, called.stdout + called.stderr
    return called.stdout


def git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout


def ran(printed: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", printed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny_workspace(tmp_path_factory.mktemp("repro") / "checkout")


def test_it_runs_every_stage_in_order(place: Workspace) -> None:
    assert ran(dvc(place.root, "repro")) == list(STAGES)
    assert dvc(place.root, "status", "--json").strip() == "{}"


def test_nothing_is_run_again(place: Workspace) -> None:
    assert ran(dvc(place.root, "repro")) == []
    assert [stage for stage in STAGES if not up_to_date(stage, place)] == []


def test_large_results_are_not_gits(place: Workspace) -> None:
    untracked = git(place.root, "status", "--short").split()[1::2]
    assert untracked == ["dvc.lock", "metrics/", "plots/"]


def test_metrics_and_plots_show(place: Workspace) -> None:
    (shown,) = json.loads(dvc(place.root, "metrics", "show", "--json")).values()
    assert {f"metrics/{stage}.json" for stage in STAGES} == shown["data"].keys()
    curves = json.loads(dvc(place.root, "plots", "show", "--json"))["data"]
    assert curves.keys() == {"reward and judge by cycle", "judge win rate by cycle", "plots/cycles.csv"}
    drawn = {point.get("field") for point in curves["reward and judge by cycle"][0]["content"]["data"]["values"]}
    assert drawn == {"reward_gain", "judge_gain"}
    assert curves["plots/cycles.csv"][0]["content"]["title"]["text"] == "KL by cycle"


def test_another_clone_pulls_what_was_pushed(place: Workspace, tmp_path: Path) -> None:
    dvc(place.root, "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    git(place.root, "add", ".dvc/config", "dvc.lock", "metrics", "plots")
    git(place.root, "commit", "--quiet", "--message", "first result")
    dvc(place.root, "push")
    clone = tmp_path / "clone"
    git(place.root, "clone", "--quiet", str(place.root), str(clone))
    dvc(clone, "pull")
    assert dvc(clone, "status", "--json").strip() == "{}"
    weights = "models/policy/model.safetensors"
    assert (clone / weights).read_bytes() == (place.root / weights).read_bytes()


def test_a_worktree_with_other_ppo_parameters_keeps_the_stages_before(place: Workspace) -> None:
    other = worktree(place, load_params(place.params, ["ppo.loss.entropy_coef=0.01"]), "entropy")
    assert [stage for stage in STAGES if up_to_date(stage, other)] == ["ingest", "validate", "reward_model"]


def test_more_cycles_run_only_ppo_and_what_follows_and_continue_it(place: Workspace) -> None:
    before = json.loads(place.metrics("ppo").read_text())
    first = place.work / "ppo" / before["fingerprint"] / "cycle_001" / "policy.safetensors"
    written = first.stat().st_mtime_ns
    text = place.params.read_text()
    assert "cycles: 2" in text
    place.params.write_text(text.replace("cycles: 2", "cycles: 3"))
    assert ran(dvc(place.root, "repro")) == ["ppo", "evaluate", "register"]
    after = json.loads(place.metrics("ppo").read_text())
    assert (after["cycles"], after["fingerprint"]) == (3, before["fingerprint"])
    assert after["mlflow_run_id"] == before["mlflow_run_id"]
    assert first.stat().st_mtime_ns == written


def test_earlier_parameters_bring_the_earlier_result_back_without_training(place: Workspace) -> None:
    place.params.write_text(place.params.read_text().replace("cycles: 3", "cycles: 2"))
    printed = dvc(place.root, "repro")
    assert ran(printed) == []
    assert printed.count("is cached - skipping run") == 3
    assert json.loads(place.metrics("ppo").read_text())["cycles"] == 2
