"""Stage 6: the gate, then the registry. A failed gate is a result to record, not an error.

Every evaluated policy becomes a registered version with its evidence. The alias `candidate` moves to it only if the
gate passes, was judged against the present champion, and only after its files were read again and compared; any other
version leaves an older candidate where it is. `champion` is never touched: people give it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.errors import DataError
from tasks.evaluation.gate import Verdict, gate
from tasks.origin import versions
from tasks.params import GateParams, Params
from tasks.registration import champion, champion_tags, model_card, registry, trail
from tasks.registration.registry import ModelVersion
from tasks.run_tags import git_tags
from tasks.stages import StageResult
from tasks.tracking import Tracker, service
from tasks.workspace import Workspace
from tasks.workspace_lock import in_turn

EVIDENCE = ("validate", "reward_model", "evaluate")
"""Stages whose figures and reports are recorded with the run here; ppo has recorded its own."""

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
            other = champion.has_changed(tracker.client, metrics["evaluate"], name, workspace)
            evidence = _evidence(tracker, workspace, metrics, rules, verdict, version, other)
            tracker.client.update_model_version(name, version.version, description=model_card.write(evidence))
            for key, value in champion_tags.tags(metrics["evaluate"], evidence.champion).items():
                tracker.client.set_model_version_tag(name, version.version, key, value)
            if not (verdict.breaches or other or evidence.decisions):  # a person has the last word
                tracker.client.set_registered_model_alias(name, registry.CANDIDATE, version.version)
    return StageResult(
        {
            "mlflow_run_id": tracker.run_id,
            "model_name": name,
            "model_version": int(version.version),
            champion_tags.GATE: verdict.word,
            champion_tags.BREACHED: verdict.breached,
            "unchecked": verdict.not_checked,
            champion_tags.OTHER: other,
        },
        _summary(f"{name} version {version.version}", verdict, other, evidence.decisions),
    )


def _registered(
    tracker: Tracker, params: Params, workspace: Workspace, metrics: Metrics, verdict: Verdict
) -> ModelVersion:
    """The version of this run that holds this policy and this evidence: the one that is there, else a new one."""
    client, name, evaluation = tracker.client, params.register_.model_name, metrics["evaluate"]
    policy = registry.policy_digest(workspace.policy)
    evidence = _digest([evaluation, params.register_.gate.model_dump(mode="json")])
    identity = {"run_id": tracker.run_id, registry.POLICY: policy, "evidence.sha256": evidence}
    if (version := registry.find_version(client, name, identity)) is not None:
        return version
    artifacts, cycle = {"checkpoint": workspace.policy}, int(metrics["ppo"]["result_cycle"])
    model = registry.log_model(client, tracker.run, f"policy-{policy[:12]}", artifacts, params.ppo.sampling, cycle)
    outcome = {champion_tags.GATE: verdict.word, champion_tags.BREACHED: ", ".join(verdict.breached) or "none"}
    outcome |= {"unchecked": ", ".join(verdict.not_checked) or "none"}
    outcome |= {"not_measured": ", ".join(evaluation.get("not_measured", {})) or "none"}
    figures = {
        key: f"{evaluation[key]:.4g}" for key in champion_tags.FIGURES if isinstance(evaluation.get(key), int | float)
    }
    tags = identity | _lineage(tracker, workspace) | outcome | figures
    return registry.create_version(client, name, model, tags, "Policies aligned to human preferences by Proximal.")


def _evidence(
    tracker: Tracker,
    workspace: Workspace,
    metrics: Metrics,
    rules: GateParams,
    verdict: Verdict,
    version: ModelVersion,
    other_champion: bool,
) -> model_card.Evidence:
    """What the version's page says. A champion that was set by hand is entered in the audit trail on the way."""
    number, client = int(version.version), tracker.client
    decisions = trail.caught_up(client, version.name)
    approved = registry.with_alias(client, version.name, registry.CHAMPION)
    beside = approved if approved and int(approved.version) != number else None
    return model_card.Evidence(
        uri=f"models:/{version.name}/{number}",
        metrics=metrics,
        rules=rules,
        breaches=[breach.words for breach in verdict.breaches],
        unchecked=[rule.words for rule in verdict.unchecked],
        provenance=_read(workspace.provenance, "ingest"),
        samples=pd.read_parquet(workspace.samples),
        champion=champion_tags.champion_of(metrics["evaluate"], beside),
        other_champion=other_champion,
        lineage=_lineage(tracker, workspace),
        decisions=[str(decision) for decision in trail.about(number, decisions)],
    )


def _lineage(tracker: Tracker, workspace: Workspace) -> dict[str, str]:
    """What the version can be traced back to: the run, the commit, and the policy's name in DVC."""
    named = {key: name for key, name in versions(workspace).items() if key == "dvc.models/policy"}
    return {"run_id": tracker.run_id} | git_tags(workspace.root) | named


def _summary(version: str, verdict: Verdict, other_champion: bool, decisions: Sequence[str]) -> str:
    if decisions:
        return f"{version} is registered and decided on already: {decisions[-1]}"
    if verdict.breaches:
        words = "; ".join(breach.words for breach in verdict.breaches)
        return f"{version} is recorded without an alias, the gate failed: {words}"
    if other_champion:
        return f"{version} passed the gate but has no alias: {champion_tags.EVALUATE_AGAIN}"
    unchecked = f" (not checked: {', '.join(verdict.not_checked)})" if verdict.unchecked else ""
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
