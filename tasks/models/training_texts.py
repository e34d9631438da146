"""The texts that models are trained on: those of PPO as token ids, the pairs of the reward model and judge cut."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ppo_core.tokens import decode, encode_prompt, encode_response
from tasks.errors import ConfigError
from tasks.params import Params
from tasks.workspace import Workspace


def training_prompts(params: Params, workspace: Workspace, tokenizer: Any, context: int | None) -> list[list[int]]:
    """The prompts of the split `ppo`. Raises ConfigError where they and a response would not fit into `context`."""
    rows = pd.read_parquet(workspace.prompts)
    rows = rows[rows.split == "ppo"]
    if rows.empty:
        raise ConfigError("has no prompts to train on", f"{workspace.prompts}:split", "give ingest more texts")
    if context and params.ingest.max_prompt_tokens + params.ppo.sampling.max_new_tokens > context:
        raise ConfigError(
            f"prompts of up to {params.ingest.max_prompt_tokens} tokens and responses of "
            f"{params.ppo.sampling.max_new_tokens} exceed the model's context of {context}",
            "ppo.sampling.max_new_tokens",
            "lower it, or ingest.max_prompt_tokens",
        )
    return [encode_prompt(tokenizer, p, f) for p, f in zip(rows["prompt"], rows["format"], strict=True)]


def preferred_texts(params: Params, workspace: Workspace, tokenizer: Any, context: int | None) -> list[list[int]]:
    """What the language-modelling term of the loss learns from: the reward model's texts that people preferred.

    Empty where the term is off. A reply ends with EOS; a text that stands for itself may be a piece of a longer one,
    and has none. Raises ConfigError where there are no texts.
    """
    if not params.ppo.loss.ptx_coef:
        return []
    pairs = pd.read_parquet(workspace.pairs)
    rows = pairs.loc[pairs.split == "reward_train", ["prompt", "format", "chosen"]].drop_duplicates()
    texts = []
    for prompt, form, chosen in rows.itertuples(index=False):
        end = [tokenizer.eos_token_id] if prompt else []
        texts.append([*encode_prompt(tokenizer, prompt, form), *encode_response(tokenizer, chosen), *end][:context])
    if not (texts := [text for text in texts if len(text) > 1]):
        raise ConfigError("needs texts, and the data have none of two tokens", "ppo.loss.ptx_coef", "set it to 0")
    return texts


def beginnings(pairs: pd.DataFrame, most: int, tokenizer: Any) -> pd.DataFrame:
    """The pairs with both texts cut to their first `most` tokens, and without those that are the same then."""
    cut = pairs.copy()
    for side in ("chosen", "rejected"):
        ids = [encode_response(tokenizer, text) for text in pairs[side]]
        texts = zip(pairs[side], ids, strict=True)
        cut[side] = [text if len(whole) <= most else decode(tokenizer, whole[:most]) for text, whole in texts]
        cut[f"{side}_tokens"] -= [max(0, len(whole) - most) for whole in ids]
    return cut[cut.chosen != cut.rejected]
