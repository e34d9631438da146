"""The gate, and the registry round trip on SQLite: what a version says, who gets the alias, and that it generates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluations import GOOD
from killing import Stages
from mlflow import MlflowClient
from registered import NAME, left_by_evaluate, params, samples, write
from stores import new_store
from tiny import tiny_params, tiny_policy

from tasks import register, tracking
from tasks.errors import DataError, IntegrityError
from tasks.pages import show
from tasks.registration import champion_tags, model_card, registry
from tasks.workspace import Workspace

pytest_plugins = ["trainings"]


@pytest.fixture
def evaluated(tmp_path: Path, policy_folder: Path) -> Workspace:
    """A workspace as the evaluate stage leaves it."""
    return left_by_evaluate(new_store(Workspace(tmp_path)), policy_folder)


def client(workspace: Workspace) -> MlflowClient:
    return tracking.connect(workspace)


def bearer(workspace: Workspace, alias: str) -> int:
    """Number of the version that bears the alias (SQLite gives a number, a server a text)."""
    return int(client(workspace).get_model_version_by_alias(NAME, alias).version)


def spread(value: float, low: float, high: float) -> str:
    return f"{show(value)} ({show(low)} to {show(high)})"


def test_a_passed_gate_makes_the_candidate(evaluated: Workspace) -> None:
    lock = {"stages": {"ppo": {"outs": [{"path": "models/policy", "md5": "d.dir"}]}}}
    (evaluated.root / "dvc.lock").write_text(json.dumps(lock), encoding="utf-8")
    result = register.run(params(), evaluated)
    assert result.metrics == {
        "mlflow_run_id": result.metrics["mlflow_run_id"],
        "model_name": NAME,
        "model_version": 1,
        "gate": "passed",
        "breached": [],
        "unchecked": ["min_champion_win_rate_low"],
        "other_champion": False,
    }
    version = client(evaluated).get_model_version_by_alias(NAME, "candidate")
    assert (int(version.version), version.status, version.run_id) == (1, "READY", result.metrics["mlflow_run_id"])
    assert version.tags["gate"] == "passed"
    assert version.tags["breached"] == "none"
    assert version.tags["dvc.models/policy"] == "d.dir"
    assert version.tags["judge_win_rate"] == "0.82"
    assert tracking.record_exists(evaluated, result.metrics["mlflow_run_id"], 1)
    run = client(evaluated).get_run(result.metrics["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["evaluate.judge_gain"] == 0.9
    assert client(evaluated).list_artifacts(run.info.run_id, "reports/evaluate")


def test_the_card_tells_what_to_decide_from(evaluated: Workspace) -> None:
    register.run(params(), evaluated)
    card = client(evaluated).get_model_version(NAME, "1").description
    for words in (
        "Gate passed", spread(0.82, 0.78, 0.86), spread(0.9, 0.8, 1.0), spread(9.0, 8.5, 9.5),
        spread(0.85, 0.83, 0.87), "10,605", "MIT", "cycle 7 of 8",
        "30 of 31 expectations", "the film 0", "maximised the function mine", "models:/aligned-policy/1",
        'python -m tasks promote 1 --model aligned-policy --reason "..."',
    ):  # fmt: skip
        assert words in card
    assert "<b>" not in card
    assert len(card) <= model_card.LIMIT


def test_the_card_shows_each_axis_and_what_nobody_measured(evaluated: Workspace) -> None:
    key = "harmless.harmful"
    change = {f"{key}_difference": -0.05, f"{key}_difference_low": -0.09, f"{key}_difference_high": -0.02}
    write(evaluated, "evaluate", GOOD | {key: 0.2, f"{key}_reference": 0.25} | change)
    register.run(params(), evaluated)
    card = client(evaluated).get_model_version(NAME, "1").description
    assert f"| {key} | 0.200 | 0.250 | {spread(-0.05, -0.09, -0.02)} |" in card
    assert "- not measured: champion: no version has the alias champion" in card


def test_a_failed_gate_is_recorded_without_an_alias(evaluated: Workspace) -> None:
    register.run(params(), evaluated)
    write(evaluated, "evaluate", GOOD | {"judge_share": 0.2, "kl": 20.0})
    result = register.run(params(), evaluated)
    assert result.metrics["gate"] == "failed"
    assert result.metrics["breached"] == ["min_judge_share", "max_kl"]
    second = client(evaluated).get_model_version(NAME, "2")
    assert second.aliases == []
    assert second.tags["breached"] == "min_judge_share, max_kl"
    assert "no alias" in second.description
    assert "KL to the reference (nats) is 20, over the most allowed, 15" in second.description
    assert bearer(evaluated, "candidate") == 1


def test_the_same_evidence_is_registered_once(evaluated: Workspace) -> None:
    first, again = (register.run(params(), evaluated).metrics for _ in range(2))
    assert first == again
    other_rules = register.run(params(max_kl=5.0), evaluated).metrics
    assert (other_rules["model_version"], other_rules["gate"]) == (2, "failed")
    models = (evaluated.root / "mlartifacts" / "models").iterdir()
    assert len(list(models)) == 1, "two versions of one policy share its files"


def test_a_deleted_version_is_made_again(evaluated: Workspace) -> None:
    first = register.run(params(), evaluated).metrics
    client(evaluated).delete_model_version(NAME, "1")
    assert not tracking.record_exists(evaluated, first["mlflow_run_id"], 1)
    second = register.run(params(), evaluated).metrics
    assert tracking.record_exists(evaluated, second["mlflow_run_id"], second["model_version"])
    assert bearer(evaluated, "candidate") == second["model_version"]


@pytest.mark.fault("31: a registered file is not what was evaluated", expected="exit 4, file named, no alias")
def test_files_that_differ_get_no_alias(evaluated: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    log_model = registry.log_model

    def damage(*args: Any) -> Any:
        model = log_model(*args)
        (stored,) = (evaluated.root / "mlartifacts").rglob("model.safetensors")
        content = bytearray(stored.read_bytes())
        content[-1] ^= 1
        stored.write_bytes(content)
        return model

    monkeypatch.setattr(registry, "log_model", damage)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        register.run(params(), evaluated)
    assert registry.with_alias(client(evaluated), NAME, "candidate") is None


@pytest.mark.fault("31: three promotions at once", expected="three versions, the newest is the candidate")
def test_promotions_at_once_take_turns(
    tmp_path: Path, policy_folder: Path, seen: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In worktrees, which share the registry. The older a version, the longer it takes to be verified."""
    main = Workspace(tmp_path / "main")
    main.root.mkdir()
    git(main.root, "init", "--quiet")
    git(main.root, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "--allow-empty", "--message", "x")
    new_store(main)
    places = []
    for number in range(3):
        git(main.root, "worktree", "add", "--quiet", "--detach", str(tmp_path / f"w{number}"))
        places.append(left_by_evaluate(Workspace(tmp_path / f"w{number}"), policy_folder))
        write(places[-1], "ppo", {"fingerprint": str(number) * 16, "cycles": 8, "result_cycle": 7})
    verify, verified = registry.verify_version, []

    def slowly(client: MlflowClient, version: Any, checkpoint: Path) -> None:
        time.sleep(1.5 - 0.5 * int(version.version))
        verify(client, version, checkpoint)
        verified.append(int(version.version))

    monkeypatch.setattr(registry, "verify_version", slowly)
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda place: register.run(params(), place).metrics, places))
    assert {result["gate"] for result in results} == {"passed"}
    assert sorted({result["model_version"] for result in results}) == [1, 2, 3]
    assert verified == [1, 2, 3], "one after another"
    assert bearer(main, "candidate") == 3
    versions = client(main).search_model_versions(f"name = '{NAME}'")
    assert [version.status for version in versions] == ["READY"] * 3
    seen("3 versions, each READY and verified, the last made is the candidate")


@pytest.mark.fault("31: killed between version and alias", expected="the same command ends it: one version, its alias")
def test_a_registration_that_was_killed_is_completed(evaluated: Workspace, server: Stages) -> None:
    evaluated.params.write_text(yaml.safe_dump(tiny_params()), encoding="utf-8")
    command, log = ["register", "--workspace", str(evaluated.root)], evaluated.root / "log"
    for kill in ("version created:1", "version verified:1"):
        assert server.run(command, log, kill) == -signal.SIGKILL, log.read_text()
        assert registry.with_alias(client(evaluated), NAME, "candidate") is None
    assert server.run(command, log) == 0, log.read_text()
    assert [int(v.version) for v in client(evaluated).search_model_versions(f"name = '{NAME}'")] == [1]
    assert bearer(evaluated, "candidate") == 1


def git(root: Path, *command: str) -> None:
    subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)


def test_the_champion_stands_beside_the_candidate_and_is_not_touched(evaluated: Workspace) -> None:
    register.run(params(), evaluated)
    client(evaluated).set_registered_model_alias(NAME, "champion", "1")
    shutil.rmtree(evaluated.policy)
    tiny_policy(evaluated.policy, seed=3)
    write(evaluated, "evaluate", GOOD | {"judge_win_rate": 0.9, "champion_version": 1})
    register.run(params(), evaluated)
    assert bearer(evaluated, "champion") == 1
    version = client(evaluated).get_model_version_by_alias(NAME, "candidate")
    assert "Champion (version 1)" in version.description
    assert "from its own evaluation" in version.description
    (row,) = [line for line in version.description.splitlines() if "Judge win rate" in line]
    assert row.split("|")[2].startswith(" 0.9")
    assert [cell.strip() for cell in row.split("|")[5:7]] == ["0.820", "+0.080"]
    tags = version.tags
    assert (tags["champion.version"], tags["champion.difference.judge_win_rate"]) == ("1", "+0.08")
    assert tags["champion.difference.kl"] == "+0"


def test_a_version_that_another_champion_was_compared_with_gets_no_alias(evaluated: Workspace) -> None:
    """Version 1 was approved between evaluate and register."""
    register.run(params(), evaluated)
    client(evaluated).set_registered_model_alias(NAME, "champion", "1")
    shutil.rmtree(evaluated.policy)
    tiny_policy(evaluated.policy, seed=3)
    write(evaluated, "evaluate", GOOD | {"judge_win_rate": 0.9})
    result = register.run(params(), evaluated)
    assert (result.metrics["gate"], result.metrics["other_champion"]) == ("passed", True)
    version = client(evaluated).get_model_version(NAME, "2")
    for said in (result.summary, version.description):
        assert "the champion is another since; run evaluate again" in said
    assert bearer(evaluated, "candidate") == 1
    write(evaluated, "evaluate", GOOD | {"judge_win_rate": 0.9, "champion_version": 1})
    register.run(params(), evaluated)
    assert bearer(evaluated, "candidate") == 3


def test_the_champion_of_another_model_is_not_what_was_measured(evaluated: Workspace) -> None:
    """The numbers of versions begin at 1 in every model."""
    register.run(params(), evaluated)
    version = client(evaluated).get_model_version(NAME, "1")
    measured = GOOD | {f"{key}_champion": 7.0 for key in champion_tags.FIGURES} | {"champion_version": 1}
    mine, theirs = (
        champion_tags.champion_of(measured | {"champion_model": model}, version) for model in (NAME, "other-policy")
    )
    assert mine
    assert theirs
    assert (mine.measured, mine.figures["kl"]) == (True, 7.0)
    assert (theirs.measured, theirs.figures["kl"]) == (False, 9.0)


def test_a_stage_that_has_not_run_is_named(evaluated: Workspace) -> None:
    evaluated.metrics("evaluate").unlink()
    with pytest.raises(DataError, match="run the evaluate stage first"):
        register.run(params(), evaluated)


def test_long_samples_and_sources_leave_room_for_the_rest(evaluated: Workspace) -> None:
    samples(400, "word " * 2000).to_parquet(evaluated.samples)
    source = {"name": "n" * 200, "source": "s" * 300, "version": "1", "licence": "MIT", "rows": 3, "sha256": "c" * 64}
    evaluated.provenance.write_text(json.dumps([source] * 30), encoding="utf-8")
    register.run(params(), evaluated)
    card = client(evaluated).get_model_version(NAME, "1").description
    assert len(card) <= model_card.LIMIT
    assert "models:/aligned-policy/1" in card
    assert "word word" in card
    assert "and 22 more" in card


def test_the_candidate_is_self_contained(evaluated: Workspace, tmp_path: Path) -> None:
    register.run(params(), evaluated)
    shutil.rmtree(evaluated.policy)
    code = (
        "import mlflow, sys; model = mlflow.pyfunc.load_model('models:/aligned-policy@candidate');"
        "print(model.predict(['the film', 'her story'], params={'max_new_tokens': 3}));"
        "assert 'ppo_core' not in sys.modules and 'tasks' not in sys.modules"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking.tracking_uri(evaluated), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = [path.name for path in (evaluated.root / "mlartifacts" / "models").rglob("*")]
    assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt"))]
