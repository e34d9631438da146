"""Reward model, trained or ready-made, and judge on disk, and the texts that they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from ppo_core.decoder import clone, frozen, load_causal_lm, split
from ppo_core.digests import sha256
from ppo_core.precision import arithmetic
from ppo_core.preferences import Pairs
from ppo_core.scorers import EncoderScorer, ReadyScorer, RewardModel, score_texts
from ppo_core.tokens import encode_conversation, encode_prompt, encode_response
from tasks.errors import DataError, IntegrityError
from tasks.workspace import Workspace, replacing

WEIGHTS = "model.safetensors"


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_base(workspace: Workspace, dtype: str) -> Any:
    """The model to align, frozen."""
    return load_causal_lm(workspace.base_model, arithmetic(dtype))


def new_reward_model(base: Any, top_layers: int) -> RewardModel:
    """A reward model over `base`'s own trunk, not yet trained."""
    trunk, top = split(base, top_layers)
    return RewardModel(trunk, clone(top), base.get_output_embeddings().in_features, base.config.pad_token_id or 0)


def load_reward_model(folder: Path, base: Any) -> RewardModel:
    """The trained reward model in `folder` over `base`'s trunk."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    scorer = new_reward_model(base, facts["top_layers"])
    _load(scorer, folder, facts)
    return scorer


def label(role: str) -> str:
    """What people call a model of the reward_model stage: `reward`, `judge`, or `reward_NAME` of several."""
    kind, _, name = role.partition("_")
    return f"reward model{f' {name}' if name else ''}" if kind == "reward" else "judge"


def trained_names(workspace: Workspace) -> list[str]:
    """Names of the trained reward models, each in a folder of its own; "" where there is one, which needs none."""
    return sorted(facts.parent.name for facts in workspace.reward_model.glob("*/facts.json")) or [""]


def is_ready_made(workspace: Workspace) -> bool:
    """Whether the reward model was not trained here, but brought by ingest."""
    source = json.loads((workspace.reward_base / "source.json").read_text(encoding="utf-8"))
    return source["ready_made"] is not None


def new_ready_reward(workspace: Workspace, dtype: str) -> tuple[ReadyScorer, Any]:
    """The ready-made reward model, its scale not yet fixed, and its tokenizer, which cuts on the left."""
    tokenizer = load_tokenizer(workspace.reward_base)
    tokenizer.truncation_side = "left"
    classifier = AutoModelForSequenceClassification.from_pretrained(
        workspace.reward_base,
        dtype=arithmetic(dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return ReadyScorer(frozen(classifier)), tokenizer


def new_judge(folder: Path) -> EncoderScorer:
    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    encoder = frozen(encoder)
    return EncoderScorer(encoder, encoder.config.pad_token_id or 0)


def save_scorer(scorer: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Put weights and what is known of them in the place of `folder`; `facts` gains their digest."""
    with replacing(folder) as beside:
        save_file({name: t.contiguous().cpu() for name, t in scorer.state_dict().items()}, beside / WEIGHTS)
        facts = facts | {"sha256": sha256(beside / WEIGHTS)}
        (beside / "facts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


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
        return score_texts(self.scorer, [judge_tokens(self.tokenizer, t, self.max_tokens) for t in texts]).cpu().numpy()


class ReadyReward:
    """A ready-made reward model; its scores are in standard deviations of human-written text."""

    def __init__(self, workspace: Workspace, dtype: str) -> None:
        facts = json.loads((workspace.reward_model / "facts.json").read_text(encoding="utf-8"))
        self.max_tokens = facts["max_tokens"]
        self.scorer, self.tokenizer = new_ready_reward(workspace, dtype)
        _load(self.scorer, workspace.reward_model, facts)

    def score(self, prompts: Sequence[str], formats: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score for each response."""
        rows = zip(prompts, formats, responses, strict=True)
        scores: list[float] = score_texts(
            self.scorer, [ready_tokens(self.tokenizer, *row, self.max_tokens) for row in rows]
        ).tolist()
        return scores


def judge_text(prompt: str, text_format: str, response: str) -> str:
    """A response in its place: the text as a whole, or the conversation with its roles spelt out."""
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


def ready_tokens(tokenizer: Any, prompt: str, text_format: str, response: str, max_tokens: int) -> list[int]:
    """Prompt and response as a ready-made reward model knows texts; a longer text loses its beginning.

    A conversation goes through the model's own chat template, or with the roles spelt out where it has none. Raises
    DataError for one that the template refuses.
    """
    if text_format == "chat" and tokenizer.chat_template:
        try:
            return encode_conversation(tokenizer, prompt, response)[-max_tokens:]
        except ValueError as error:
            mend = "choose a reward model whose template takes such conversations"
            raise DataError(str(error), f"ingest.reward, prompt {prompt:.80}", mend) from error
    text = judge_text(prompt, text_format, response)
    ids: list[int] = tokenizer(text, split_special_tokens=True, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


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
