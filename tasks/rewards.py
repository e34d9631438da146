"""What PPO maximises: the trained reward model, a ready-made one, or a function of the user's own.

Whichever it is, scores are in standard deviations of human-written text, so that gains, shares, clips and penalties
keep their unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ppo_core.models import ActorCritic
from ppo_core.rollout import FunctionReward, ModelReward, PlainReward, RewardFunction
from ppo_core.scorers import RewardModel
from ppo_core.tokens import decode, encode_prompt
from tasks.own_function import OwnFunction
from tasks.params import Params
from tasks.preference_models import ReadyReward, is_ready_made, load_reward_model
from tasks.workspace import Workspace

_BATCH = 64
"""Texts that a function is given at once to find its scale."""


def load_trained(params: Params, workspace: Workspace, base: Any) -> RewardModel | None:
    """The reward model over `base`'s trunk, if PPO maximises one that was trained: a critic can start from it."""
    if params.ppo.reward.function is not None or is_ready_made(workspace):
        return None
    return load_reward_model(workspace, base)


def described(params: Params, workspace: Workspace) -> str:
    """What PPO maximises, in words for a report."""
    if params.ppo.reward.function is not None:
        return f"the function {params.ppo.reward.function}, which stands for the reward model in the figures"
    return "a ready-made reward model" if is_ready_made(workspace) else "the trained reward model"


def new_reward(
    params: Params,
    workspace: Workspace,
    tokenizer: Any,
    model: ActorCritic,
    trained: RewardModel | None,
    others: Sequence[tuple[str, str]] = (),
) -> RewardFunction:
    """The reward that `params` name; `trained` is what `load_trained` gave, `tokenizer` the policy's.

    `others` are prompts, with their formats, that may be asked beside those of the data.

    Raises ConfigError for a function that is not there or fails.
    """
    if trained is not None:
        return ModelReward(trained, model)
    prompts = pd.read_parquet(workspace.prompts)
    columns = [*zip(prompts["prompt"], prompts["format"], strict=True), *others]
    # Functions are given prompts as the data has them, and not what the policy's tokens would read like.
    known = {tuple(encode_prompt(tokenizer, prompt, form)): prompt for prompt, form in columns}
    return FunctionReward(
        _function(params, workspace, dict(columns)),
        lambda tokens: known[tuple(tokens)],
        partial(decode, tokenizer),
    )


def _function(params: Params, workspace: Workspace, formats: dict[str, str]) -> PlainReward:
    """`formats` are those of the prompts."""
    if params.ppo.reward.function is not None:
        own = OwnFunction(params.ppo.reward.function, workspace.own_data)
        return on_human_scale(own, *_human_texts(workspace))
    ready = ReadyReward(workspace, params.ppo.model.dtype)
    return lambda prompts, responses: ready.score(prompts, [formats[prompt] for prompt in prompts], responses)


def on_human_scale(function: PlainReward, prompts: list[str], responses: list[str]) -> PlainReward:
    """`function` with mean 0 and standard deviation 1 over human-written `responses`.

    As it is, if they are all equal to it.
    """
    batches = [slice(start, start + _BATCH) for start in range(0, len(responses), _BATCH)]
    human = np.concatenate([function(prompts[batch], responses[batch]) for batch in batches])
    if human.min() == human.max():
        return function
    mean, std = float(human.mean()), float(human.std())
    return lambda prompts, responses: [(score - mean) / std for score in function(prompts, responses)]


def _human_texts(workspace: Workspace) -> tuple[list[str], list[str]]:
    """Prompts and responses that the reward model is measured on; a text that stands for itself has the prompt ''."""
    pairs = pd.read_parquet(workspace.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    texts = [
        text for column in ("chosen", "rejected") for text in zip(held_out["prompt"], held_out[column], strict=True)
    ]
    prompts, responses = zip(*dict.fromkeys(texts), strict=True)
    return list(prompts), list(responses)
