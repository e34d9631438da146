"""Stage 6: the gate, then the registry. A failed gate is a result to record, not an error.

Every evaluated policy becomes a registered version with its evidence. The alias `candidate` moves to it only if the
gate passes, and only after its files were read again and compared; a failed version leaves an older candidate where it
is. `champion` is never touched: people give it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tasks import champion_tags, model_card, registry, trail
from tasks.errors import DataError
from tasks.params import GateParams, Params
from tasks.registry import ModelVersion
from tasks.run_tags import git_tags
from tasks.stages import StageResult
from tasks.statistics import relative_change
from tasks.tracking import Tracker, service
from tasks.workspace import Workspace
from tasks.workspace_lock import in_turn

EVIDENCE = ("validate", "reward_model", "evaluate")
"""Stages whose figures and reports are recorded with the run here; ppo has recorded its own."""

Metrics = Mapping[str, Mapping[str, Any]]
"""metrics/STAGE.json by stage."""


@dataclass(frozen=True)
class Breach:
    """A rule of the gate that does not hold. `figure` is None where there is none, or none that is finite."""

    rule: str
    figure: float | None
    threshold: float
    words: str


def gate(metrics: Mapping[str, Any], rules: GateParams) -> list[Breach]:
    """The breached rules; none means that the gate passes. A figure that is missing or not finite breaches its rule."""

    def value(name: str) -> float:
        found = metrics.get(name)
        return float(found) if isinstance(found, int | float) else math.nan

    def change(name: str) -> float:
        now, before = value(name), value(f"{name}_reference")
        return relative_change(now, before) if math.isfinite(now) and math.isfinite(before) else math.nan

    figures: dict[str, tuple[str, Callable[[str], float], str]] = {
        "min_judge_win_rate": ("judge win rate", value, "judge_win_rate"),
        "min_judge_win_rate_low": ("lower end of the judge win rate's interval", value, "judge_win_rate_low"),
        "min_judge_share": ("share of the reward gain that the judge confirms", value, "judge_share"),
        "max_kl": ("KL to the reference (nats)", value, "kl"),
        "max_distinct2_change": ("relative change of distinct-2", change, "distinct_2"),
        "max_repetition_change": ("relative change of the repetition rate", change, "repetition"),
    }
    checked = ((rule, what, figure(name)) for rule, (what, figure, name) in figures.items())
    return [breach for rule, what, figure in checked if (breach := _breach(rule, what, figure, getattr(rules, rule)))]


def run(params: Params, workspace: Workspace) -> StageResult:
    """Judge the evaluation by the gate and register the policy with it. The same evidence is registered once."""
    metrics = {stage: _read(workspace.metrics(stage), stage) for stage in (*EVIDENCE, "ppo")}
    name, rules = params.register_.model_name, params.register_.gate
    breaches = gate(metrics["evaluate"], rules)
    with Tracker.open(workspace, metrics["ppo"]["fingerprint"], params) as tracker, service(tracker.client):
        for stage in EVIDENCE:
            tracker.log_stage(stage, metrics[stage], workspace.report(stage))
        with in_turn(workspace.registry_lock):  # the newest version is the one named last, and it is the one verified
            version = _registered(tracker, params, workspace, metrics, breaches)
            registry.verify_version(tracker.client, version, workspace.policy)
            evidence = _evidence(tracker, workspace, metrics, rules, breaches, version)
            tracker.client.update_model_version(name, version.version, description=model_card.write(evidence))
            for key, value in champion_tags.tags(metrics["evaluate"], evidence.champion).items():
                tracker.client.set_model_version_tag(name, version.version, key, value)
            if not breaches and not evidence.decisions:  # a person has the last word
                tracker.client.set_registered_model_alias(name, registry.CANDIDATE, version.version)
    return StageResult(
        {
            "mlflow_run_id": tracker.run_id,
            "model_name": name,
            "model_version": int(version.version),
            "gate": _verdict(breaches),
            "breached": [breach.rule for breach in breaches],
        },
        _summary(f"{name} version {version.version}", breaches, evidence.decisions),
    )


def _breach(rule: str, what: str, figure: float, threshold: float) -> Breach | None:
    least = rule.startswith("min_")
    if not math.isfinite(figure):
        return Breach(rule, None, threshold, f"{what} is missing or not finite")
    if figure >= threshold if least else figure <= threshold:
        return None
    words = f"{what} is {figure:.4g}, {'under the least' if least else 'over the most'} allowed, {threshold:g}"
    return Breach(rule, figure, threshold, words)


def _registered(
    tracker: Tracker, params: Params, workspace: Workspace, metrics: Metrics, breaches: Sequence[Breach]
) -> ModelVersion:
    """The version of this run that holds this policy and this evidence: the one that is there, else a new one."""
    client, name, evaluation = tracker.client, params.register_.model_name, metrics["evaluate"]
    policy = registry.combined(registry.digests(workspace.policy))
    evidence = _digest([evaluation, params.register_.gate.model_dump(mode="json")])
    identity = {"run_id": tracker.run_id, registry.POLICY: policy, "evidence.sha256": evidence}
    if (version := registry.find_version(client, name, identity)) is not None:
        return version
    artifacts, cycle = {"checkpoint": workspace.policy}, int(metrics["ppo"]["result_cycle"])
    model = registry.log_model(client, tracker.run, f"policy-{policy[:12]}", artifacts, params.ppo.sampling, cycle)
    verdict = {"gate": _verdict(breaches), "breached": ", ".join(breach.rule for breach in breaches) or "none"}
    figures = {
        key: f"{evaluation[key]:.4g}" for key in champion_tags.FIGURES if isinstance(evaluation.get(key), int | float)
    }
    tags = identity | _lineage(tracker, workspace) | verdict | figures
    return registry.create_version(client, name, model, tags, "Policies aligned to human preferences by Proximal.")


def _evidence(
    tracker: Tracker,
    workspace: Workspace,
    metrics: Metrics,
    rules: GateParams,
    breaches: Sequence[Breach],
    version: ModelVersion,
) -> model_card.Evidence:
    """What the version's page says. A champion that was set by hand is entered in the audit trail on the way."""
    number, client = int(version.version), tracker.client
    decisions = trail.caught_up(client, version.name)
    champion = registry.with_alias(client, version.name, registry.CHAMPION)
    other = champion if champion and int(champion.version) != number else None
    return model_card.Evidence(
        uri=f"models:/{version.name}/{number}",
        metrics=metrics,
        rules=rules,
        breaches=[breach.words for breach in breaches],
        provenance=_read(workspace.provenance, "ingest"),
        samples=pd.read_parquet(workspace.samples),
        champion=champion_tags.champion_of(metrics["evaluate"], other),
        lineage=_lineage(tracker, workspace),
        decisions=[str(decision) for decision in trail.about(number, decisions)],
    )


def _lineage(tracker: Tracker, workspace: Workspace) -> dict[str, str]:
    """What the version can be traced back to: the run, the commit, and the policy's name in DVC."""
    lock = workspace.root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    outputs = {out["path"]: out for stage in stages.values() for out in stage.get("outs", [])}
    policy = outputs.get(str(workspace.policy.relative_to(workspace.root)), {})
    named = {"dvc.models/policy": policy["md5"]} if "md5" in policy else {}
    return {"run_id": tracker.run_id} | git_tags(workspace.root) | named


def _verdict(breaches: Sequence[Breach]) -> str:
    return "failed" if breaches else "passed"


def _summary(version: str, breaches: Sequence[Breach], decisions: Sequence[str]) -> str:
    if decisions:
        return f"{version} is registered and decided on already: {decisions[-1]}"
    if not breaches:
        return f"{version} passed the gate and is the candidate; a person can make it champion"
    return f"{version} is recorded without an alias, the gate failed: {'; '.join(breach.words for breach in breaches)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, stage: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", str(path), f"run the {stage} stage first") from None
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", str(path), f"run the {stage} stage again") from error
