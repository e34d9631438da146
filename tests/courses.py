"""All that a training leaves, for comparing two of them bit for bit; only what the clock says is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ppo_core.checkpoint import MANIFEST
from ppo_core.digests import sha256
from tasks import tracking
from tasks.processes import HOST, PID, STARTED
from tasks.tracking import connect
from tasks.workspace import Workspace

OF_THE_CLOCK = ("time/", "system/")
OF_THE_PROCESS = (HOST, PID, STARTED, "mlflow.user", "mlflow.source", "mlflow.log-model.history")


def course(workspace: Workspace) -> dict[str, Any]:
    """Files by digest, records and figures by value, and the whole of what MLflow holds of it."""
    found: dict[str, Any] = {}
    for path in sorted(workspace.runs.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, "lock"):
            found[str(path.relative_to(workspace.runs))] = _content(path)
    for path in sorted([*workspace.policy.rglob("*"), *workspace.critic.rglob("*")]):
        found[str(path.relative_to(workspace.root))] = sha256(path)
    found["cycles.csv"] = workspace.cycles_csv.read_text()
    found["metrics"] = json.loads(workspace.metrics("ppo").read_text()) | {"mlflow_run_id": None}
    return found | {"mlflow": _history(workspace)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    mlflow = one["mlflow"].keys() | other["mlflow"].keys()
    return [key for key in sorted((one.keys() | other.keys()) - {"mlflow"}) if one.get(key) != other.get(key)] + [
        f"mlflow {key}" for key in sorted(mlflow) if one["mlflow"].get(key) != other["mlflow"].get(key)
    ]


def _content(path: Path) -> Any:
    if path.name != "record.json":
        return sha256(path)
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith(OF_THE_CLOCK)}


def _history(workspace: Workspace) -> dict[str, Any]:
    """Every run, with every point of every metric, however often it was recorded."""
    client = connect(workspace)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    runs = client.search_runs([experiment])
    found: dict[str, Any] = {"runs": [run.info.status for run in runs]}
    for run in runs:
        found["params"] = run.data.params
        found["tags"] = {
            k: v for k, v in run.data.tags.items() if not k.startswith(OF_THE_PROCESS) and k != "proximal.git.dirty"
        }
        found["inputs"] = sorted(each.dataset.name for each in run.inputs.dataset_inputs)
        found["outputs"] = sorted(output.step for output in run.outputs.model_outputs)
        for key in run.data.metrics:
            if not key.startswith("system/"):
                points = client.get_metric_history(run.info.run_id, key)
                found[key] = [(p.step, None if key.startswith("time/") else p.value.hex()) for p in points]
    for model in client.search_logged_models([experiment]):
        figures = {m.key: (m.step, m.value.hex()) for m in model.metrics if not m.key.startswith(OF_THE_CLOCK)}
        found.setdefault(model.name, []).append((model.status.value, model.params, figures))
    return found
