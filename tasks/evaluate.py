"""Stage 5: the aligned policy against the reference on the test prompts, with the same seeds.

In: models/{base,policy,reward,judge}, the test prompts, metrics/ppo.json, plots/cycles.csv. Out: metrics/evaluate.json,
reports/samples.parquet, reports/evaluate, and the same in the MLflow run of the training.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ppo_core.seeds import derive
from tasks import report
from tasks.errors import DataError, TrainingHealthError
from tasks.params import Params
from tasks.responders import Responders
from tasks.responses import Responses
from tasks.stages import StageResult
from tasks.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_share,
    compare,
    distinct_n,
    judge_differences,
    part_gains,
    relative_change,
    repetition,
    repetitions,
    same_length,
    wins,
)
from tasks.tracking import Tracker
from tasks.workspace import Workspace

SPLIT = "test"
MEASURED = ("reward", "judge", "kl", "entropy", "ref_nll")

log = logging.getLogger(__name__)


def run(params: Params, workspace: Workspace) -> StageResult:
    """Ask both models, measure, write samples and report, record.

    Raises DataError where the ppo stage left nothing, TrainingHealthError where a figure is not finite.
    """
    ppo, cycles = _training(workspace)
    # Opened first: minutes of work are not begun when there is nowhere to record them.
    with Tracker.open(workspace, ppo["fingerprint"], params) as tracker:
        if tracker.run_id != ppo["mlflow_run_id"]:
            log.warning("MLflow run %s is gone; the evaluation is recorded in a new one", ppo["mlflow_run_id"])
        responders = Responders(params, workspace)
        reference, policy = responders.reference(SPLIT), responders.policy(SPLIT)
        metrics = measure(policy, reference, params.evaluate.bootstrap, derive(params.seed, "evaluate"))
        metrics |= {"mlflow_run_id": tracker.run_id}
        evaluation = report.Evaluation(metrics, ppo, cycles, samples(policy, reference), policy, reference)
        _write(evaluation, params, workspace)
        tracker.log_stage("evaluate", metrics, workspace.report("evaluate"))
    return StageResult(metrics, report.verdict(metrics)[1])


def measure(policy: Responses, reference: Responses, resamples: int, seed: int) -> dict[str, Any]:
    """Every figure of the evaluation; where it is a mean over prompts, `_low` and `_high` bound it at 95 %."""
    _check_finite(policy, "aligned policy")
    _check_finite(reference, "reference")
    judge, reward = judge_differences(policy, reference), np.subtract(policy.reward, reference.reward, dtype=np.float64)
    repeated = {n: repetitions(policy.texts, n) - repetitions(reference.texts, n) for n in (1, 3)}
    intervals = {
        "judge_win_rate": bootstrap_mean(wins(judge, np.zeros_like(judge)), resamples, seed),
        "reward_win_rate": bootstrap_mean(wins(policy.reward, reference.reward), resamples, seed),
        "reward_gain": bootstrap_mean(reward, resamples, seed),
        "judge_gain": bootstrap_mean(judge, resamples, seed),
        "judge_share": bootstrap_share(judge, reward, resamples, seed),
        "kl": bootstrap_mean(policy.kl, resamples, seed),
        "repetition_difference": bootstrap_mean(repeated[1], resamples, seed),
        "repetition_3_difference": bootstrap_mean(repeated[3], resamples, seed),
    }
    intervals |= {
        f"reward_gain_{name}": bootstrap_mean(gain, resamples, seed)
        for name, gain in part_gains(policy, reference).items()
    }
    metrics = {key: bound for name, interval in intervals.items() for key, bound in _bounds(name, interval)}
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
    return {"n": len(policy.prompts), **metrics}


def samples(policy: Responses, reference: Responses) -> pd.DataFrame:
    """Every test prompt with both answers and what reward model and judge say of them."""
    return pd.DataFrame(
        {
            "prompt": policy.prompts,
            "reference": reference.texts,
            "policy": policy.texts,
            "reward_reference": reference.reward,
            "reward_policy": policy.reward,
            "judge_reference": reference.judge,
            "judge_policy": policy.judge,
        }
    )


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


def _bounds(name: str, interval: Interval) -> list[tuple[str, float]]:
    return [(name, interval.value), (f"{name}_low", interval.low), (f"{name}_high", interval.high)]


def _check_finite(responses: Responses, model: str) -> None:
    for name in MEASURED:
        bad = np.flatnonzero(~np.isfinite(getattr(responses, name)))
        if len(bad):
            raise TrainingHealthError(
                f"{name} is not finite for {len(bad)} of {len(responses.prompts)} answers of the {model}",
                f"test prompt {bad[0]}",
                "a model in models/ is broken: run the stage that made it again",
            )


def _training(workspace: Workspace) -> tuple[dict[str, Any], pd.DataFrame]:
    """What the ppo stage left: its metrics and its cycles."""
    metrics, curves = workspace.metrics("ppo"), workspace.cycles_csv
    for path in (metrics, curves):
        if not path.is_file():
            raise DataError("is missing", str(path.relative_to(workspace.root)), "run `python -m tasks ppo` first")
    return json.loads(metrics.read_text(encoding="utf-8")), pd.read_csv(curves)


def _write(evaluation: report.Evaluation, params: Params, workspace: Workspace) -> None:
    """Samples and report, each written beside its place and moved there whole."""
    folder, table = workspace.report("evaluate"), workspace.samples
    beside, table_beside = _beside(folder), _beside(table)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    report.write(beside, evaluation, params, workspace)
    evaluation.samples.to_parquet(table_beside, index=False)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    table_beside.replace(table)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.writing")
