"""The one schema of `params.yaml`: a section a stage, unknown keys refused, every default explained.

Light to import (no torch, no pandas), because the Prefect UI draws its form from it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ppo_core.config import Count, Fraction, Positive, PPOConfig, RewardConfig, Section
from tasks.data_params import IngestParams, ValidateParams
from tasks.errors import ConfigError, Problem
from tasks.strict_yaml import parse_yaml


class PreferenceTraining(Section):
    """Training of one model of preferences."""

    steps: Count = 100
    """Optimiser steps."""
    batch_pairs: Count = 64
    """Pairs a step; texts that several pairs share are read once."""
    learning_rate: Positive = 1.0e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Longer texts are cut on the left, so that their end is read. (Of a ready-made reward model this alone counts.)"""


class RewardModelParams(Section):
    top_layers: Count = 6
    """Layers of the reward model's own, above the policy's frozen trunk; as many as `ppo.model.top_layers` share its
    pass."""
    reward: PreferenceTraining = PreferenceTraining()
    """The model that PPO maximises, on the policy's own trunk."""
    judge: PreferenceTraining = PreferenceTraining()
    """The second opinion: another pretrained model, other texts; it never trains anything."""
    min_accuracy: Fraction = 0.75
    """Held-out pair accuracy (rating gap of at least `accuracy_gap`) under which the stage fails."""
    accuracy_gap: Annotated[float, Field(ge=0)] = 1.0


class TargetParams(Section):
    """When training has reached what it is for, on the dev prompts."""

    metric: Literal["judge_win_rate", "judge_gain", "reward_gain"] = "judge_win_rate"
    threshold: float = 0.82
    patience: Count = 1
    """For how many cycles in a row."""


class RewardParams(RewardConfig):
    """The reward of the algorithm, and where its scores are from."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] | None = None
    """`module:function`: a Python function of prompts and responses that scores in place of the reward model. The
    module is a file in data/own, or installed."""


class PPOParams(PPOConfig):
    """The PPO stage: the algorithm, and when its cycles stop."""

    reward: RewardParams = RewardParams()
    cycles: Count = 8
    """At most this many. Raising it continues a finished run."""
    target: TargetParams | None = TargetParams()
    kl_budget: Positive = 15.0
    """Sequence KL to the reference (nats). The result is the last cycle within it."""
    keep_states: Count = 2
    """After how many of the last cycles training can go on (each keeps weights and optimiser in float32). Every cycle's
    weights are kept anyway."""


class EvaluateParams(Section):
    bootstrap: Count = 2000
    """Resamples behind each 95 % interval."""
    samples: Count = 12
    """Pairs of responses shown in the report."""
    seeds: Count = 1
    """Answers of each model to each prompt; several make the intervals narrower, and take so many times as long."""


class GateParams(Section):
    """What a candidate must show; every breached rule is named.

    Of the last five a profile may lack the data (or the champion). Then they are reported as not checked; written into
    params.yaml they must hold, and a figure that was not measured is a breach.
    """

    min_judge_win_rate: Fraction = 0.75
    min_judge_win_rate_low: Fraction = 0.70
    """Lower end of the 95 % interval."""
    min_judge_share: float = 0.5
    """Judge gain over reward gain, both in standard deviations of human text: below it, the reward is being gamed."""
    max_kl: Positive = 15.0
    """Sequence KL to the reference, nats."""
    max_distinct2_change: Positive = 0.2
    """Relative change of distinct-2 against the reference."""
    max_repetition_change: Positive = 0.2
    """Relative change of the share of repeated words against the reference."""
    max_harmful_increase: float = 0.02
    """Rise of the share of harmful replies to red-team prompts, policy minus reference."""
    max_over_refusal_increase: float = 0.05
    """Rise of the share of harmless requests that are refused."""
    min_honest_p: Fraction = 0.05
    """A fall of an honest figure must be explained by chance at least so well: its p value, times the number of honest
    figures."""
    max_perplexity_change: Positive = 0.1
    """Relative change of the perplexity of plain text against the reference."""
    min_champion_win_rate_low: Fraction = 0.4
    """Lower end of the interval of the judge win rate against the champion. An equal model has about 0.45 with 400
    prompts."""


class RegisterParams(Section):
    model_name: str = "aligned-policy"
    """Registered model that the candidate becomes a version of."""
    gate: GateParams = GateParams()


class Params(Section):
    """Everything that decides what comes out."""

    seed: int = 17
    """Of every random choice."""
    ingest: IngestParams
    # pydantic itself has a `validate`; the alias keeps the section named after its stage.
    validation: ValidateParams = Field(default=ValidateParams(), alias="validate")
    reward_model: RewardModelParams = RewardModelParams()
    ppo: PPOParams = PPOParams()
    evaluate: EvaluateParams = EvaluateParams()
    register_: RegisterParams = Field(default=RegisterParams(), alias="register")


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read and check parameters.

    `overrides` are `section.key=value` strings, the value read as YAML.
    Raises ConfigError that lists every problem with its path in the file.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError("no such file", str(path), "name one with --params FILE") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path), "name a file with --params FILE") from error
    except ValueError as error:
        raise ConfigError(f"is not YAML: {error}", str(path), "mend the line it names") from error
    if not isinstance(raw, dict):
        raise ConfigError("holds no sections", str(path), "start from the params.yaml of the repository")
    for override in overrides:
        _apply(raw, override)
    return check_params(raw, str(path))


def check_params(raw: dict[str, Any], where: str = "params") -> Params:
    """Params from plain values; raises ConfigError naming every unknown or impossible key."""
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_problem(where, detail) for detail in error.errors()]) from error


def dump_params(params: Params) -> dict[str, Any]:
    """Plain values in the shape of `params.yaml`."""
    return params.model_dump(mode="json", by_alias=True)


def _problem(where: str, detail: Any) -> Problem:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return Problem("no such parameter", f"{where}:{key}", "see tasks/params.py for those there are")
    value = detail["input"]
    # Through YAML's aliases a small file can hold a list of any size.
    shown = f"{value!r:.80}" if isinstance(value, str) else reprlib.repr(value)
    return Problem(f"{detail['msg']} (got {shown})", f"{where}:{key}")


def _apply(raw: dict[str, Any], override: str) -> None:
    match = re.fullmatch(r"([\w.]+)=(.*)", override, flags=re.DOTALL)
    if not match:
        raise ConfigError(f"cannot read {override!r}", "--set", "write it as section.key=value")
    *parents, key = match[1].split(".")
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{match[1]} does not name a key", "--set")
    try:
        node[key] = parse_yaml(match[2])
    except ValueError as error:
        raise ConfigError(f"{match[2]!r:.80} is no YAML value", f"--set {match[1]}", "quote it") from error
