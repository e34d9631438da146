"""Stage 3: the reward model that PPO maximises, trained or ready-made, and the judge that checks it, on other texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ppo_core.preferences import Pairs, fit
from ppo_core.scorers import EncoderScorer, ReadyScorer, RewardModel, Scorer, TextScorer, score_texts
from ppo_core.seeds import derive
from tasks.errors import ConfigError, TrainingHealthError
from tasks.models import preference_models as models
from tasks.models.preference_models import label
from tasks.models.training_texts import beginnings
from tasks.params import Params, PreferenceTraining
from tasks.reports.reward_model import write_report
from tasks.stages import StageResult
from tasks.statistics import accuracy_interval, by_margin, expected_calibration_error, rater_ceiling
from tasks.workspace import Workspace, replacing

Encode = Callable[[str, str, str], list[int]]
"""Prompt, format and response to token ids."""

MARGIN_EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0)


def run(params: Params, workspace: Workspace) -> StageResult:
    """Train both, measure them on texts held out from each, and fail under the accuracy that params ask for.

    A ready-made reward model is only measured, and its scale fixed.
    """
    pairs = pd.read_parquet(workspace.pairs)
    if params.reward_model.reply_tokens:
        pairs = beginnings(pairs, params.reward_model.reply_tokens, models.load_tokenizer(workspace.base_model))
    ready_made = models.is_ready_made(workspace)
    fit_or_measure = _measure_ready_made if ready_made else _train_reward_model
    # A name of its own for each only where there are several: else what was one stays as it was.
    names = [""] if ready_made else _names(pairs)
    found = {name: fit_or_measure(params, workspace, pairs, name) for name in names}
    judge_model, judge = _train_judge(params, workspace, pairs)
    metrics = {_role(name): figures for name, (_, figures) in found.items()} | {"judge": judge}
    write_report(metrics, workspace)
    _check(metrics, params, ready_made)  # before anything that was there is replaced
    form = (
        {"max_tokens": params.reward_model.reward.max_tokens}
        if ready_made
        else {"top_layers": params.reward_model.top_layers}
    )
    with replacing(workspace.reward_model) as beside:
        for name, (scorer, _) in found.items():
            models.save_scorer(scorer, beside / name, {"ready_made": ready_made} | form)
    models.save_scorer(judge_model, workspace.judge, {"max_tokens": params.reward_model.judge.max_tokens})
    reached = ", ".join(f"{label(role)} {figures['accuracy']:.3f}" for role, figures in metrics.items())
    return StageResult(
        metrics,
        f"held-out accuracy at a rating gap of {params.reward_model.accuracy_gap:g} or more: "
        f"{'ready-made ' if ready_made else ''}{reached}",
    )


def _names(pairs: pd.DataFrame) -> list[str]:
    """The rewards that sources name, if they are several: each is a model of its own. Else ""."""
    names = sorted(set(pairs["reward"]) - {""})
    return names if len(names) > 1 else [""]


def _role(name: str) -> str:
    return f"reward_{name}" if name else "reward"


def _of(pairs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The pairs of one of several rewards; those without a name belong to each."""
    return pairs[pairs["reward"].isin(["", name])] if name else pairs


def _measure_ready_made(
    params: Params, workspace: Workspace, pairs: pd.DataFrame, name: str
) -> tuple[ReadyScorer, dict[str, Any]]:
    most = params.reward_model.reward.max_tokens
    scorer, tokenizer = models.new_ready_reward(workspace, params.ppo.model.dtype)
    config = scorer.classifier.config.get_text_config()
    _check_reads("reward", most, min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", most)))

    def encode(prompt: str, form: str, text: str) -> list[int]:
        return models.ready_tokens(tokenizer, prompt, form, text, most)

    return scorer, _measure("reward", scorer, pairs, encode, params)


def _train_reward_model(
    params: Params, workspace: Workspace, pairs: pd.DataFrame, name: str
) -> tuple[RewardModel, dict[str, Any]]:
    training, pairs = params.reward_model.reward, _of(pairs, name)
    tokenizer = models.load_tokenizer(workspace.base_model)
    base = models.load_base(workspace, params.ppo.model.dtype)
    scorer = models.new_reward_model(base, params.reward_model.top_layers)

    def encode(prompt: str, form: str, text: str) -> list[int]:
        return models.reward_tokens(tokenizer, prompt, form, text, training.max_tokens)

    _train("reward", scorer, pairs, encode, params, training)
    return scorer, _measure("reward", scorer, pairs, encode, params)


def _train_judge(params: Params, workspace: Workspace, pairs: pd.DataFrame) -> tuple[EncoderScorer, dict[str, Any]]:
    training = params.reward_model.judge
    tokenizer = models.load_tokenizer(workspace.judge_base)
    scorer = models.new_judge(workspace.judge_base)
    _check_reads("judge", training.max_tokens, scorer.encoder.config.max_position_embeddings)

    def encode(prompt: str, form: str, text: str) -> list[int]:
        return models.judge_tokens(tokenizer, models.judge_text(prompt, form, text), training.max_tokens)

    _train("judge", scorer, pairs, encode, params, training)
    return scorer, _measure("judge", scorer, pairs, encode, params)


def _check_reads(role: str, most: int, limit: int) -> None:
    if most > limit:
        raise ConfigError(
            f"{most} is more than the {limit} tokens that the model can read",
            f"reward_model.{role}.max_tokens",
            f"set it to {limit} at most",
        )


def _train(
    role: str, scorer: TextScorer, pairs: pd.DataFrame, encode: Encode, params: Params, training: PreferenceTraining
) -> None:
    """Fit on the role's training pairs."""
    _held_out(role, pairs, params)  # what cannot be measured is not trained
    train = models.tokenise_pairs(pairs[pairs.split == f"{role}_train"], encode)
    with tqdm(total=training.steps, desc=f"training the {role} model", unit="step", disable=None) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        fit(
            scorer,
            train,
            steps=training.steps,
            batch_pairs=training.batch_pairs,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            seed=derive(params.seed, role),
            on_step=on_step,
        )


def _held_out(role: str, pairs: pd.DataFrame, params: Params) -> pd.DataFrame:
    rows = pairs[pairs.split == f"{role}_eval"]
    if not (rows["margin"] >= params.reward_model.accuracy_gap).any():
        raise ConfigError(
            f"no held-out pair of the {role} model has a margin of {params.reward_model.accuracy_gap:g} or more",
            "reward_model.accuracy_gap",
            "lower it to the scale of your margins",
        )
    return rows


def _measure(role: str, scorer: Scorer, pairs: pd.DataFrame, encode: Encode, params: Params) -> dict[str, Any]:
    """Figures on the role's held-out pairs, whose texts fix the scorer's scale."""
    rows = _held_out(role, pairs, params)
    held_out = models.tokenise_pairs(rows, encode)
    raw = score_texts(scorer, held_out.texts)
    scorer.head.calibrate(raw)
    return _figures(raw.double().cpu().numpy(), held_out, rows, params.reward_model.accuracy_gap)


def _figures(raw: np.ndarray, pairs: Pairs, rows: pd.DataFrame, gap: float) -> dict[str, Any]:
    """Held-out figures from raw scores [texts], whose differences are the log-odds of the Bradley-Terry model."""
    difference = raw[pairs.chosen] - raw[pairs.rejected]
    correct = np.where(difference == 0, 0.5, difference > 0)
    margin, target = rows["margin"].to_numpy(), rows["target"].to_numpy()
    wide = margin >= gap
    groups = rows["group"].to_numpy()  # pairs of a group share texts, and with them their luck
    accuracy, every = accuracy_interval(correct[wide], groups[wide]), accuracy_interval(correct, groups)
    ece, bins = expected_calibration_error(1 / (1 + np.exp(-difference)), target)
    longer = np.sign(rows["chosen_tokens"].to_numpy() - rows["rejected_tokens"].to_numpy())
    sides = {"longer": correct[longer > 0], "shorter": correct[longer < 0]}
    return {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "n": accuracy.n,
        "accuracy_all": every.value,
        "accuracy_all_low": every.low,
        "accuracy_all_high": every.high,
        "n_all": every.n,
        "ece": ece,
        "rater_ceiling": rater_ceiling(target),
        "longer_wins": float(((longer + 1) / 2).mean()),
        # A model that had learnt length would be right on the one side and wrong on the other.
        **{f"accuracy_where_{side}_wins": float(right.mean()) for side, right in sides.items() if len(right)},
        "by_margin": by_margin(correct, margin, MARGIN_EDGES),
        "calibration": bins,
    }


def _check(metrics: dict[str, Any], params: Params, ready_made: bool) -> None:
    floor = params.reward_model.min_accuracy
    for role, figures in metrics.items():
        mend = f"give it more pairs or more reward_model.{role.partition('_')[0]}.steps"
        if role == "reward" and ready_made:
            mend = "choose another for ingest.reward"
        if figures["accuracy"] < floor:
            raise TrainingHealthError(
                f"the {label(role)} is right on {figures['accuracy']:.3f} of held-out pairs, under {floor}",
                "reward_model.min_accuracy",
                f"{mend}; what it did is in reports/reward_model",
            )
