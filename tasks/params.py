"""The one schema of `params.yaml`: a section a stage, unknown keys refused, every default explained.

Light to import (no torch, no pandas), because the Prefect UI draws its form from it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ppo_core.config import Count, Fraction, Natural, Positive, PPOConfig, RewardConfig, Section
from tasks.data_params import IngestParams, ValidateParams
from tasks.errors import ConfigError, Problem
from tasks.strict_yaml import parse_yaml


class PreferenceTraining(Section):
    """Training of one model of preferences."""

    steps: Count = 80
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
    reply_tokens: Count | None = None
    """Both models read only the first so many tokens of a reply, in training and when measured: as many as PPO samples
    (`ppo.sampling.max_new_tokens`) make what they learn from like what they will score. Empty: whole replies."""
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
    threshold: float = 0.78
    patience: Count = 1
    """For how many cycles in a row."""


FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


class RewardPart(Section):
    """One of several rewards: a rule, a function, or a reward model where it says neither."""

    weight: Positive = 1.0
    """What its score, in standard deviations of human text, is multiplied by."""
    rule: Literal["length"] | None = None
    """`length`: the nearer a response is to `target` tokens, the better."""
    target: Count | None = None
    """`length` only, tokens."""
    function: FunctionName | None = None
    """As `ppo.reward.function`."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardPart:
        if self.rule and self.function:
            raise ValueError("a part is a rule or a function; make two parts of it")
        if bool(self.rule) != bool(self.target):
            raise ValueError("`rule: length` and `target` belong together")
        return self

    @property
    def is_model(self) -> bool:
        return not (self.rule or self.function)


class RewardParams(RewardConfig):
    """The reward of the algorithm, and where its scores are from."""

    function: FunctionName | None = None
    """`module:function`: a Python function of prompts and responses that scores in place of the reward model. The
    module is a file in data/own, or installed."""
    parts: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*$")], RewardPart] = Field(default_factory=dict)
    """Several rewards at once, by names of your own. Empty: the reward model alone, or `function`."""
    combine: Literal["sum", "worst"] = "sum"
    """One score from the weighted scores of the parts: their sum, or the least of them."""

    @model_validator(mode="after")
    def _one_way(self) -> RewardParams:
        if self.function and self.parts:
            raise ValueError("`function` is the one reward, `parts` are several: make the function a part")
        return self

    def functions(self) -> dict[str, str]:
        """Every function by the parameter that names it."""
        named = {"ppo.reward.function": self.function}
        named |= {f"ppo.reward.parts.{name}.function": part.function for name, part in self.parts.items()}
        return {key: function for key, function in named.items() if function is not None}


class PPOParams(PPOConfig):
    """The PPO stage: the algorithm, and when its cycles stop."""

    reward: RewardParams = RewardParams()
    sampler: Literal["own", "vllm"] = "own"
    """What answers the prompts of rollouts: the policy itself, or a vLLM server with its weights (docs/vllm.md)."""
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
    inspect: Natural = 3
    """Test prompts that the report shows completions of, token by token. 0: none."""


MayLack = Literal[
    "max_harmful_increase",
    "max_over_refusal_increase",
    "max_honest_fall",
    "max_perplexity_change",
    "min_champion_win_rate_low",
]
"""Rules of the gate whose figures not every profile can measure, for want of data or of a champion."""


class GateParams(Section):
    """What a candidate must show; every breached rule is named.

    Of the last five rules a profile may lack the data (or the champion). Then they are reported as not checked, unless
    `must_be_measured` names them.
    """

    must_be_measured: tuple[MayLack, ...] = ()
    """Rules that a figure which was not measured breaches."""

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
    max_honest_fall: float = 0.02
    """The most by which an honest figure may have fallen, chance aside: the upper end of the 95 % interval of its
    difference must not lie further below 0."""
    max_perplexity_change: Positive = 0.1
    """Relative change of the perplexity of plain text against the reference."""
    min_champion_win_rate_low: Fraction = 0.4
    """Lower end of the interval of the judge win rate against the champion. An equal model has about 0.45 with 400
    prompts."""


class RegisterParams(Section):
    model_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "aligned-policy"
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


def load_params(path: Path, overrides: Sequence[str] = (), profile: Path | None = None) -> Params:
    """Read and check parameters.

    `profile` is a file of what differs from `path`: sections are merged, lists and sources replaced. `overrides` come
    after it: `section.key=value` strings, the value read as YAML.
    Raises ConfigError that lists every problem with its path in the file that it is in.
    """
    raw = _read(path, "name one with --params FILE")
    differing = _read(profile, "see docs/profiles.md") if profile else {}
    raw = merged(raw, differing)
    for override in overrides:
        _apply(raw, override)
    return check_params(raw, str(path), (str(profile), differing))


def merged(raw: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the values of `over`, mapping by mapping. One that names a `source` is taken whole.

    The file and the digest beside a source are its own: those of another would not be found in it.
    """
    result = dict(raw)
    for key, value in over.items():
        present = result.get(key)
        if isinstance(value, Mapping) and isinstance(present, Mapping) and "source" not in value:
            value = merged(present, value)
        result[key] = value
    return result


def check_params(raw: dict[str, Any], where: str = "params", over: tuple[str, Mapping[str, Any]] = ("", {})) -> Params:
    """Params from plain values; raises ConfigError naming every unknown or impossible key.

    `over` are the name and the values of a file that was merged into them: what is wrong with these is in that file.
    """
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(over[0] if _is_in(over[1], d["loc"]) else where, d) for d in error.errors()]
        raise ConfigError(problems) from error


def dump_params(params: Params) -> dict[str, Any]:
    """Plain values in the shape of `params.yaml`."""
    return params.model_dump(mode="json", by_alias=True)


def _read(path: Path, mend: str) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError("no such file", str(path), mend) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path), mend) from error
    except ValueError as error:
        raise ConfigError(f"is not YAML: {error}", str(path), "mend the line it names") from error
    if not isinstance(raw, dict):
        raise ConfigError("holds no sections", str(path), "start from the params.yaml of the repository")
    return raw


def _is_in(values: Mapping[str, Any], keys: Sequence[int | str]) -> bool:
    """Whether the values say something under these keys, one within the other; what is below a list is the list's."""
    node: Any = values
    for key in keys:
        if not isinstance(node, Mapping):
            return True
        if key not in node:
            return False
        node = node[key]
    return True


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
