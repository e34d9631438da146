"""What PPO maximises: the trained reward model, a ready-made one, a function of the user's own, or several at once.

Whichever it is, scores are in standard deviations of human-written text, so that gains, shares, clips and penalties
keep their unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ppo_core.models import ActorCritic
from ppo_core.rollout import CombinedReward, FunctionReward, LengthReward, ModelReward, PlainReward, RewardFunction
from ppo_core.scorers import RewardModel
from ppo_core.tokens import decode, encode_prompt, encode_response
from tasks.errors import ConfigError
from tasks.models.own_function import KEY, OwnFunction
from tasks.models.preference_models import ReadyReward, is_ready_made, load_reward_model, trained_names
from tasks.params import Params, RewardPart
from tasks.workspace import Workspace

_BATCH = 64
"""Texts that a function is given at once to find its scale."""


def load_trained(params: Params, workspace: Workspace, base: Any) -> dict[str, RewardModel]:
    """The trained reward models over `base`'s trunk that PPO maximises, by the names of their parts."""
    ready_made, models = is_ready_made(workspace), _models(params)
    trained = [""] if ready_made else trained_names(workspace)
    several = len(trained) > 1
    if (several or len(models) > 1) and (unknown := [name for name in models if name not in trained]):
        there = f"those are {', '.join(trained)}" if several else "there is one, without a name"
        mend = f"{there}: give sources of ingest.data the names of the parts (`reward`), or change the parts"
        raise ConfigError(f"no reward model of its own for {', '.join(unknown) or 'it'}", "ppo.reward.parts", mend)
    if ready_made:
        return {}
    return {name: load_reward_model(workspace.reward_model / (name if several else ""), base) for name in models}


def only(trained: Mapping[str, RewardModel]) -> RewardModel | None:
    """The one reward model that a critic can start from; None where there is none, or several."""
    return next(iter(trained.values())) if len(trained) == 1 else None


def described(params: Params, workspace: Workspace) -> str:
    """What PPO maximises, in words for a report."""
    reward = params.ppo.reward
    if reward.function is not None:
        return f"the function {reward.function}, which stands for the reward model in the figures"
    model = "a ready-made reward model" if is_ready_made(workspace) else "the trained reward model"
    if not reward.parts:
        return model
    how = "the sum" if reward.combine == "sum" else "the worst"
    said = [f"{part.weight:g} x {name} ({_kind(part, model)})" for name, part in reward.parts.items()]
    return f"{how} of {', '.join(said)}, which stands for the reward model in the figures"


def new_reward(
    params: Params,
    workspace: Workspace,
    tokenizer: Any,
    model: ActorCritic,
    trained: Mapping[str, RewardModel],
    further: Sequence[tuple[str, str]] = (),
) -> RewardFunction:
    """The reward that `params` name; `trained` is what `load_trained` gave, `tokenizer` the policy's.

    `further` are prompts with their formats that are asked beside those of the data. Raises ConfigError for a function
    that is not there or fails.
    """
    parts = {name: ModelReward(scorer, model) for name, scorer in trained.items()}
    wanted = params.ppo.reward.parts or {"": RewardPart(function=params.ppo.reward.function)}
    prompts = pd.read_parquet(workspace.prompts)
    asked = [*zip(prompts["prompt"], prompts["format"], strict=True), *further]
    found: dict[str, RewardFunction] = {
        name: parts[name] if name in parts else _untrained(name, part, params, workspace, tokenizer, asked)
        for name, part in wanted.items()
    }
    if not params.ppo.reward.parts:
        return found[""]
    weights = {name: part.weight for name, part in wanted.items()}
    return CombinedReward(found, weights, params.ppo.reward.combine == "worst")


def _models(params: Params) -> list[str]:
    """Names of the parts that are reward models; "" for the single one."""
    reward = params.ppo.reward
    if reward.parts:
        return [name for name, part in reward.parts.items() if part.is_model]
    return [] if reward.function is not None else [""]


def _kind(part: RewardPart, model: str) -> str:
    if part.rule:
        return f"about {part.target} tokens long"
    return f"the function {part.function}" if part.function else model


def _untrained(
    name: str, part: RewardPart, params: Params, workspace: Workspace, tokenizer: Any, asked: Sequence[tuple[str, str]]
) -> RewardFunction:
    """A rule, a function, or the ready-made reward model; `asked` are all prompts with their formats."""
    if part.target is not None:
        _, responses = _human_texts(workspace)
        return LengthReward(
            part.target, *_scale([-abs(len(encode_response(tokenizer, text)) - part.target) for text in responses])
        )
    # Functions are given prompts as the data has them, and not what the policy's tokens would read like.
    known = {tuple(encode_prompt(tokenizer, prompt, form)): prompt for prompt, form in asked}
    key = f"ppo.reward.parts.{name}.function" if name else KEY
    return FunctionReward(
        _function(part, key, params, workspace, dict(asked)),
        lambda tokens: known[tuple(tokens)],
        partial(decode, tokenizer),
    )


def _function(part: RewardPart, key: str, params: Params, workspace: Workspace, formats: dict[str, str]) -> PlainReward:
    """`formats` are those of the prompts."""
    if part.function is not None:
        return on_human_scale(OwnFunction(part.function, workspace.own_data, key), *_human_texts(workspace))
    ready = ReadyReward(workspace, params.ppo.model.dtype)
    return lambda prompts, responses: ready.score(prompts, [formats[prompt] for prompt in prompts], responses)


def on_human_scale(function: PlainReward, prompts: list[str], responses: list[str]) -> PlainReward:
    """`function` with mean 0 and standard deviation 1 over human-written `responses`.

    As it is, if they are all equal to it.
    """
    batches = [slice(start, start + _BATCH) for start in range(0, len(responses), _BATCH)]
    mean, std = _scale(np.concatenate([function(prompts[batch], responses[batch]) for batch in batches]))
    return lambda prompts, responses: [(score - mean) / std for score in function(prompts, responses)]


def _scale(scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the scores of human-written texts; 0 and 1 where they are all equal."""
    if np.min(scores) == np.max(scores):
        return 0.0, 1.0
    return float(np.mean(scores)), float(np.std(scores))


def _human_texts(workspace: Workspace) -> tuple[list[str], list[str]]:
    """Prompts and responses that the reward model is measured on; a text that stands for itself has the prompt ''."""
    pairs = pd.read_parquet(workspace.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    texts = [
        text for column in ("chosen", "rejected") for text in zip(held_out["prompt"], held_out[column], strict=True)
    ]
    prompts, responses = zip(*dict.fromkeys(texts), strict=True)
    return list(prompts), list(responses)
