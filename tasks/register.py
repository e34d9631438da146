"""Stage 6: the gate, then the registry. A failed gate is a result to record, not an error.

Every evaluated policy becomes a registered version with its evidence. The alias `candidate` moves to it only if the
gate passes, and only after its files were read again and compared; a failed version leaves an older candidate where it
is. `champion` is never touched: people give it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tasks import model_card, registry
from tasks.errors import DataError
from tasks.gate import Breach, Unchecked, Verdict, gate
from tasks.origin import versions
from tasks.params import GateParams, Params
from tasks.registry import ModelVersion
from tasks.run_tags import git_tags
from tasks.stages import StageResult
from tasks.tracking import Tracker, service
from tasks.workspace import Workspace
from tasks.workspace_lock import in_turn

EVIDENCE = ("validate", "reward_model", "evaluate")
"""Stages whose figures and reports are recorded with the run here; ppo has recorded its own."""
FIGURES = ("judge_win_rate", "reward_gain", "judge_gain", "judge_share", "kl")
"""Go into the version's tags, so that versions can be compared in the registry's list."""

Metrics = Mapping[str, Mapping[str, Any]]
"""metrics/STAGE.json by stage."""


def run(params: Params, workspace: Workspace) -> StageResult:
    """Judge the evaluation by the gate and register the policy with it. The same evidence is registered once."""
    metrics = {stage: _read(workspace.metrics(stage), stage) for stage in (*EVIDENCE, "ppo")}
    name, rules = params.register_.model_name, params.register_.gate
    verdict = gate(metrics["evaluate"], rules)
    with Tracker.open(workspace, metrics["ppo"]["fingerprint"], params) as tracker, service(tracker.client):
        for stage in EVIDENCE:
            tracker.log_stage(stage, metrics[stage], workspace.report(stage))
        with in_turn(workspace.registry_lock):  # the newest version is the one named last, and it is the one verified
            version = _registered(tracker, params, workspace, metrics, verdict)
            registry.verify_version(tracker.client, version, workspace.policy)
            card = _card(tracker, workspace, metrics, rules, verdict, version)
            tracker.client.update_model_version(name, version.version, description=card)
            if not verdict.breaches:
                tracker.client.set_registered_model_alias(name, registry.CANDIDATE, version.version)
    return StageResult(
        {
            "mlflow_run_id": tracker.run_id,
            "model_name": name,
            "model_version": int(version.version),
            "gate": verdict.word,
            "breached": _rules(verdict.breaches),
            "unchecked": _rules(verdict.unchecked),
        },
        _summary(f"{name} version {version.version}", verdict),
    )


def _registered(
    tracker: Tracker, params: Params, workspace: Workspace, metrics: Metrics, verdict: Verdict
) -> ModelVersion:
    """The version of this run that holds this policy and this evidence: the one that is there, else a new one."""
    client, name, evaluation = tracker.client, params.register_.model_name, metrics["evaluate"]
    policy = registry.policy_digest(workspace.policy)
    evidence = _digest([evaluation, params.register_.gate.model_dump(mode="json")])
    identity = {"run_id": tracker.run_id, "policy.sha256": policy, "evidence.sha256": evidence}
    if (version := registry.find_version(client, name, identity)) is not None:
        return version
    artifacts, cycle = {"checkpoint": workspace.policy}, int(metrics["ppo"]["result_cycle"])
    model = registry.log_model(client, tracker.run, f"policy-{policy[:12]}", artifacts, params.ppo.sampling, cycle)
    outcome = {"gate": verdict.word, "breached": ", ".join(_rules(verdict.breaches)) or "none"}
    outcome |= {"unchecked": ", ".join(_rules(verdict.unchecked)) or "none"}
    outcome |= {"not_measured": ", ".join(evaluation.get("not_measured", {})) or "none"}
    figures = {key: f"{evaluation[key]:.4g}" for key in FIGURES if isinstance(evaluation.get(key), int | float)}
    tags = identity | _lineage(tracker, workspace) | outcome | figures
    return registry.create_version(client, name, model, tags, "Policies aligned to human preferences by Proximal.")


def _card(
    tracker: Tracker,
    workspace: Workspace,
    metrics: Metrics,
    rules: GateParams,
    verdict: Verdict,
    version: ModelVersion,
) -> str:
    champion = registry.with_alias(tracker.client, version.name, registry.CHAMPION)
    evidence = model_card.Evidence(
        uri=f"models:/{version.name}/{version.version}",
        metrics=metrics,
        rules=rules,
        breaches=[breach.words for breach in verdict.breaches],
        unchecked=[rule.words for rule in verdict.unchecked],
        provenance=_read(workspace.provenance, "ingest"),
        samples=pd.read_parquet(workspace.samples),
        champion=(str(champion.version), champion.tags) if champion else None,
        lineage=_lineage(tracker, workspace),
    )
    return model_card.write(evidence)


def _lineage(tracker: Tracker, workspace: Workspace) -> dict[str, str]:
    """What the version can be traced back to: the run, the commit, and the policy's name in DVC."""
    named = {key: name for key, name in versions(workspace).items() if key == "dvc.models/policy"}
    return {"run_id": tracker.run_id} | git_tags(workspace.root) | named


def _rules(outcomes: Sequence[Breach] | Sequence[Unchecked]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(outcome.rule for outcome in outcomes))


def _summary(version: str, verdict: Verdict) -> str:
    if verdict.breaches:
        words = "; ".join(breach.words for breach in verdict.breaches)
        return f"{version} is recorded without an alias, the gate failed: {words}"
    unchecked = f" (not checked: {', '.join(_rules(verdict.unchecked))})" if verdict.unchecked else ""
    return f"{version} passed the gate{unchecked} and is the candidate; a person can make it champion"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", str(path), f"run the {stage} stage first") from None
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", str(path), f"run the {stage} stage again") from error
