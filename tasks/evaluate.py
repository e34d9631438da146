"""Stage 5: the aligned policy against the reference and the champion, with the same seeds, on every axis of the probes.

In: models/{base,policy,reward,judge}, the test prompts, data/probes, metrics/ppo.json, plots/cycles.csv, and the
champion in the registry. Out: metrics/evaluate.json, reports/samples.parquet, reports/evaluate, and the same in the
MLflow run of the training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ppo_core.seeds import derive
from tasks.errors import DataError, TrainingHealthError
from tasks.evaluation import axes
from tasks.evaluation.comparisons import BROKEN_MODEL, bounds
from tasks.evaluation.gate import gate
from tasks.evaluation.responders import Responders
from tasks.inspector import drawing, inspection
from tasks.models.responses import Responses
from tasks.params import Params
from tasks.probes.base import CHAMPION, POLICY, REFERENCE, TEST, NotMeasured
from tasks.registration import champion
from tasks.registration.champion import Champion
from tasks.reports.evaluation import Evaluation, verdict, write_report
from tasks.stages import StageResult
from tasks.statistics import (
    bootstrap_mean,
    bootstrap_share,
    compare,
    distinct_n,
    part_gains,
    relative_change,
    repetition,
    repetitions,
    same_length,
    score_differences,
    wins,
)
from tasks.tracking import Tracker, service
from tasks.workspace import Workspace, replacing

MEASURED = ("reward", "judge", "kl", "entropy", "ref_nll")

log = logging.getLogger(__name__)


def run(params: Params, workspace: Workspace) -> StageResult:
    """Ask all models, measure, write samples and report, record.

    Raises DataError where the ppo stage left nothing, TrainingHealthError where a figure is not finite.
    """
    ppo, cycles = _training(workspace)
    name = params.register_.model_name
    # Opened first: minutes of work are not begun when there is nowhere to record them.
    with Tracker.open(workspace, ppo["fingerprint"], params) as tracker, service(tracker.client):
        if tracker.run_id != ppo["mlflow_run_id"]:
            log.warning("MLflow run %s is gone; the evaluation is recorded in a new one", ppo["mlflow_run_id"])
        with champion.present(tracker.client, name, workspace) as approved:
            evaluation = _evaluated(params, workspace, approved, ppo | {"mlflow_run_id": tracker.run_id}, cycles)
        _write(evaluation, params, workspace)
        tracker.log_stage("evaluate", evaluation.metrics, workspace.report("evaluate"))
    return StageResult(evaluation.metrics, verdict(evaluation.metrics, evaluation.axes, evaluation.gate)[1])


def _evaluated(
    params: Params, workspace: Workspace, approved: Champion, ppo: dict[str, Any], cycles: pd.DataFrame
) -> Evaluation:
    asked = Responders(params, workspace, cycles, approved.folder)
    answers = {subject: asked.responses(subject, TEST) for subject in asked.subjects}
    for subject, responses in answers.items():
        _check_finite(responses, subject)
    resamples, seed = params.evaluate.bootstrap, derive(params.seed, "evaluate")
    found = axes.measure(asked, resamples, seed)
    if approved.folder is None:
        found = found.without(NotMeasured(CHAMPION, "against the champion", approved.reason))
    metrics = measure(answers[POLICY], answers[REFERENCE], resamples, seed, params.evaluate.seeds)
    if CHAMPION in answers:  # as ours: the same prompts, seeds, judge and reference
        measured = compare(answers[CHAMPION], answers[REFERENCE])
        metrics |= {f"{key}_champion": value for key, value in measured.items() if not key.endswith("_reference")}
    metrics |= found.metrics | approved.facts | {"mlflow_run_id": ppo["mlflow_run_id"]}
    del asked  # its models: the inspector loads its own
    prompts = inspection.drawn_prompts(params, workspace, TEST, params.evaluate.inspect)
    looked_at = drawing.blocks(inspection.inspect(params, workspace, prompts, inspection.COMPLETIONS))
    judged = gate(metrics, params.register_.gate)
    return Evaluation(
        metrics, ppo, cycles, samples(answers), answers[POLICY], answers[REFERENCE], found, judged, looked_at
    )


def measure(policy: Responses, reference: Responses, resamples: int, seed: int, seeds: int = 1) -> dict[str, Any]:
    """Every figure of the answers of two; where it is a mean over prompts, `_low` and `_high` bound it at 95 %.

    `seeds` says how many times over the prompts stand there.
    """
    n = len(policy.prompts) // seeds
    prompts = np.arange(len(policy.prompts)) % n
    judge, reward = (score_differences(policy, reference, role) for role in ("judge", "reward"))
    repeated = {k: repetitions(policy.texts, k) - repetitions(reference.texts, k) for k in (1, 3)}
    means = {
        "judge_win_rate": wins(judge, np.zeros_like(judge)),
        "reward_win_rate": wins(reward, np.zeros_like(reward)),
        "reward_gain": reward,
        "judge_gain": judge,
        "kl": policy.kl,
        "repetition_difference": repeated[1],
        "repetition_3_difference": repeated[3],
    }
    means |= {f"reward_gain_{name}": gain for name, gain in part_gains(policy, reference).items()}
    intervals = {name: bootstrap_mean(x, resamples, seed, prompts) for name, x in means.items()}
    intervals["judge_share"] = bootstrap_share(judge, reward, resamples, seed, prompts)
    metrics = {key: bound for name, interval in intervals.items() for key, bound in bounds(name, interval).items()}
    metrics |= compare(policy, reference)
    metrics |= _language(policy, reference)
    metrics |= {"distinct_2_change": relative_change(metrics["distinct_2"], metrics["distinct_2_reference"])}
    answers, before = same_length(policy.texts, reference.texts)
    metrics |= {
        "repetition_same_length": repetition(answers),
        "repetition_same_length_reference": repetition(before),
        "distinct_2_same_length": distinct_n(answers, 2),
        "distinct_2_same_length_reference": distinct_n(before, 2),
    }
    for name in ("repetition", "repetition_3", "repetition_same_length", "distinct_2_same_length"):
        metrics |= {f"{name}_change": relative_change(metrics[name], metrics[f"{name}_reference"])}
    return {"n": n, **metrics}


def samples(answers: Mapping[str, Responses]) -> pd.DataFrame:
    """Every test prompt with the answers of all subjects and what reward model and judge say of them."""
    subjects = [subject for subject in (REFERENCE, POLICY, CHAMPION) if subject in answers]
    columns: dict[str, Any] = {"prompt": answers[POLICY].prompts} | {s: answers[s].texts for s in subjects}
    columns |= {f"{role}_{s}": getattr(answers[s], role) for role in ("reward", "judge") for s in subjects}
    return pd.DataFrame(columns)


def _language(policy: Responses, reference: Responses) -> dict[str, float]:
    """What `compare` leaves out because no cycle is stopped by it."""
    both = (("", policy), ("_reference", reference))
    return {
        **{f"distinct_{n}{of}": distinct_n(responses.texts, n) for n in (1, 3) for of, responses in both},
        **{
            f"{role}{of}": float(getattr(responses, role).mean())
            for role in ("reward", "judge")
            for of, responses in both
        },
    }


def _check_finite(responses: Responses, subject: str) -> None:
    for name in MEASURED:
        bad = np.flatnonzero(~np.isfinite(getattr(responses, name)))
        if len(bad):
            what = f"{name} is not finite for {len(bad)} of {len(responses.prompts)} answers of the {subject}"
            raise TrainingHealthError(what, f"test prompt {bad[0]}", BROKEN_MODEL)


def _training(workspace: Workspace) -> tuple[dict[str, Any], pd.DataFrame]:
    """What the ppo stage left: its metrics and its cycles."""
    metrics, curves = workspace.metrics("ppo"), workspace.cycles_csv
    for path in (metrics, curves):
        if not path.is_file():
            raise DataError("is missing", str(path.relative_to(workspace.root)), "run `python -m tasks ppo` first")
    return json.loads(metrics.read_text(encoding="utf-8")), pd.read_csv(curves)


def _write(evaluation: Evaluation, params: Params, workspace: Workspace) -> None:
    """Samples and report, each written beside its place and moved there whole."""
    table = workspace.samples.with_name(f"{workspace.samples.name}.writing")
    with replacing(workspace.report("evaluate")) as beside:
        write_report(beside, evaluation, params, workspace)
        evaluation.samples.to_parquet(table, index=False)
    table.replace(workspace.samples)
