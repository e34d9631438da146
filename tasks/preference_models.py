"""Reward model and judge on disk, and the texts that they read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from ppo_core.checkpoint import sha256
from ppo_core.decoder import clone, load_causal_lm, split, without_dropout
from ppo_core.preferences import Pairs
from ppo_core.scorers import EncoderScorer, RewardModel, score_texts
from ppo_core.tokens import encode_prompt, encode_response
from tasks.errors import IntegrityError
from tasks.workspace import Workspace

WEIGHTS = "model.safetensors"


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_base(workspace: Workspace, dtype: str) -> Any:
    """The model to align, frozen."""
    return load_causal_lm(workspace.base_model, getattr(torch, dtype))


def new_reward_model(base: Any, top_layers: int) -> RewardModel:
    """A reward model over `base`'s own trunk, not yet trained."""
    trunk, top = split(base, top_layers)
    return RewardModel(trunk, clone(top), base.config.hidden_size, base.config.pad_token_id or 0)


def load_reward_model(workspace: Workspace, base: Any) -> RewardModel:
    """The trained reward model over `base`'s trunk."""
    facts = json.loads((workspace.reward_model / "facts.json").read_text(encoding="utf-8"))
    scorer = new_reward_model(base, facts["top_layers"])
    _load(scorer, workspace.reward_model, facts)
    return scorer


def new_judge(folder: Path) -> EncoderScorer:
    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    encoder = without_dropout(encoder).requires_grad_(False)
    return EncoderScorer(encoder, encoder.config.pad_token_id or 0)


def save_scorer(scorer: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Put weights and what is known of them in the place of `folder`; `facts` gains their digest."""
    beside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in scorer.state_dict().items()}, beside / WEIGHTS)
    facts = facts | {"sha256": sha256(beside / WEIGHTS)}
    (beside / "facts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _load(scorer: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    if (found := sha256(folder / WEIGHTS)) != facts["sha256"]:
        raise IntegrityError(
            f"SHA-256 is {found}, was {facts['sha256']} when written",
            str(folder / WEIGHTS),
            "run the reward_model stage again, or `dvc checkout`",
        )
    scorer.load_state_dict(load_file(folder / WEIGHTS))
    scorer.requires_grad_(False)


class Judge:
    """The second opinion: scores of whole texts, in standard deviations of human-written text."""

    def __init__(self, workspace: Workspace) -> None:
        facts = json.loads((workspace.judge / "facts.json").read_text(encoding="utf-8"))
        self.max_tokens = facts["max_tokens"]
        self.tokenizer = load_tokenizer(workspace.judge_base)
        self.scorer = new_judge(workspace.judge_base)
        _load(self.scorer, workspace.judge, facts)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[N] scores."""
        return score_texts(self.scorer, [judge_tokens(self.tokenizer, t, self.max_tokens) for t in texts]).numpy()


def judge_text(prompt: str, text_format: str, response: str) -> str:
    """What the judge reads: the text as a whole, or the conversation with its roles spelt out."""
    if text_format == "text":
        return prompt + response
    turns = [f"{turn['role']}: {turn['content']}" for turn in json.loads(prompt)]
    return "\n".join([*turns, f"assistant: {response}"])


def judge_tokens(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """Token ids with the encoder's own markers; a longer text loses its beginning."""
    words = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    return [tokenizer.cls_token_id, *words[max(0, len(words) - room) :], tokenizer.sep_token_id]


def reward_tokens(tokenizer: Any, prompt: str, text_format: str, response: str, max_tokens: int) -> list[int]:
    """Prompt and response as the policy sees them, without EOS; a longer text loses its beginning."""
    tokens = [*encode_prompt(tokenizer, prompt, text_format), *encode_response(tokenizer, response)]
    return tokens[-max_tokens:]


def tokenise_pairs(frame: pd.DataFrame, encode: Any) -> Pairs:
    """Pairs over the list of their different texts; `encode(prompt, format, response)` gives token ids."""
    positions: dict[tuple[str, ...], int] = {}
    texts: list[list[int]] = []

    def position(*key: str) -> int:
        if key not in positions:
            positions[key] = len(texts)
            texts.append(encode(*key))
        return positions[key]

    prompts = list(zip(frame["prompt"], frame["format"], strict=True))
    chosen = [position(*prompt, text) for prompt, text in zip(prompts, frame["chosen"], strict=True)]
    rejected = [position(*prompt, text) for prompt, text in zip(prompts, frame["rejected"], strict=True)]
    return Pairs(texts, chosen, rejected, frame["target"].tolist())
