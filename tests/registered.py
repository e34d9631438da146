"""What the evaluate stage leaves, without its models; and a registry with versions for those who decide on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from evaluations import GOOD
from mlflow import MlflowClient
from stores import new_store
from tiny import tiny_params, tiny_policy

from tasks import register, tracking
from tasks.params import Params, check_params
from tasks.workspace import Workspace

NAME = "aligned-policy"


def left_by_evaluate(workspace: Workspace, policy_folder: Path) -> Workspace:
    root = workspace.root
    for folder in (workspace.canonical, workspace.policy.parent, root / "metrics", workspace.report("evaluate")):
        folder.mkdir(parents=True)
    shutil.copytree(policy_folder, workspace.policy)
    write(workspace, "evaluate", GOOD)
    write(
        workspace,
        "ppo",
        {
            "fingerprint": "a" * 16,
            "cycles": 8,
            "result_cycle": 7,
            "stopped_by": "cycles",
            "maximised": "the function mine:score",
        },
    )
    role = {"accuracy": 0.85, "accuracy_low": 0.83, "accuracy_high": 0.87, "n": 1200, "ece": 0.02}
    write(workspace, "reward_model", {"reward": role, "judge": role | {"accuracy": 0.875}})
    write(workspace, "validate", {"expectations": {"checked": 31, "passed": 30}})
    source = {"name": "ratings", "source": "pypi:ratings", "version": "3.3.2", "licence": "MIT", "rows": 10605}
    workspace.provenance.write_text(json.dumps([source | {"sha256": "c" * 64}]), encoding="utf-8")
    workspace.pairs.write_bytes(b"pairs")
    workspace.prompts.write_bytes(b"prompts")
    samples(400).to_parquet(workspace.samples)
    (workspace.report("evaluate") / "report.html").write_text("<p>before and after</p>", encoding="utf-8")
    return workspace


def write(workspace: Workspace, stage: str, metrics: dict[str, Any]) -> None:
    workspace.metrics(stage).write_text(json.dumps(metrics), encoding="utf-8")


def samples(n: int, text: str = "is a | *film* [x](http://y)\nthat <b>moves</b>") -> pd.DataFrame:
    scores = {f"{kind}_{who}": [0.25] * n for kind in ("reward", "judge") for who in ("reference", "policy")}
    return pd.DataFrame(
        {"prompt": [f"the film {i}" for i in range(n)], "reference": [text] * n, "policy": [text] * n} | scores
    )


def params(**rules: float) -> Params:
    return check_params(tiny_params() | {"register": {"gate": rules}})


@pytest.fixture(scope="session")
def registered_once(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> Workspace:
    """Versions 1 to 3 passed the gate, the last is the candidate; version 4 failed. Nobody has decided anything."""
    place = left_by_evaluate(new_store(Workspace(tmp_path_factory.mktemp("registry"))), policy_folder)
    place.params.write_text(yaml.safe_dump(tiny_params()), encoding="utf-8")
    register.run(params(), place)
    for seed, figures in ((5, {}), (6, {}), (7, {"kl": 20.0})):
        register_another(place, seed, **figures)
    return place


@pytest.fixture
def shelf(registered_once: Workspace, tmp_path: Path) -> Workspace:
    """A registry of the test's own with those versions; their files are shared."""
    place = Workspace(tmp_path / "shelf")
    place.root.mkdir()
    for name in ("mlflow.db", "params.yaml"):
        shutil.copy(registered_once.root / name, place.root / name)
    return place


def register_another(place: Workspace, seed: int, **figures: Any) -> int:
    """Train, evaluate and register one more policy; its version."""
    shutil.rmtree(place.policy)
    tiny_policy(place.policy, seed=seed)
    write(place, "evaluate", GOOD | figures)
    version: int = register.run(params(), place).metrics["model_version"]
    return version


def mlflow(place: Workspace) -> MlflowClient:
    return tracking.connect(place)


def aliases(place: Workspace) -> dict[str, int]:
    """Version by alias."""
    return {alias: int(number) for alias, number in mlflow(place).get_registered_model(NAME).aliases.items()}
