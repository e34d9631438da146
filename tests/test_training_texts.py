"""The texts that models are trained on: which they are, how they end, where they are cut, and that they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from transformers import AutoTokenizer

from tasks.errors import ConfigError
from tasks.models.training_texts import beginnings, preferred_texts, training_prompts
from tasks.params import Params, check_params
from tasks.workspace import Workspace

CHAT = json.dumps([{"role": "user", "content": "Hi"}])
PAIRS = [
    ("text", "", "a film that moves", "reward_train"),
    ("text", "", "a film that moves", "reward_train"),
    ("text", "why?", " because", "reward_train"),
    ("chat", CHAT, "Hello<|im_end|>", "reward_train"),
    ("text", "", "measured", "reward_eval"),
    ("text", "", "judged", "judge_train"),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.canonical.mkdir(parents=True)
    pairs = pd.DataFrame(PAIRS, columns=["format", "prompt", "chosen", "split"])
    pairs.assign(rejected=[f"bad {i}" for i in range(len(pairs))]).to_parquet(workspace.pairs)
    prompts = [("text", "the film", "ppo"), ("chat", CHAT, "ppo"), ("text", "asked", "dev")]
    pd.DataFrame(prompts, columns=["format", "prompt", "split"]).to_parquet(workspace.prompts)
    return workspace


@pytest.fixture
def tokenizer(policy_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(policy_folder)


def params(**ppo: Any) -> Params:
    return check_params(tiny._merge(tiny.tiny_params(), {"ppo": ppo}))


def test_preferred_texts_are_those_that_train_the_reward_model(workspace: Workspace, tokenizer: Any) -> None:
    found = preferred_texts(params(loss={"ptx_coef": 1.0}), workspace, tokenizer, 256)
    eos, ordinary = tokenizer.eos_token_id, tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    assert [tokenizer.decode(ids) for ids in found] == [
        "<|im_start|>a film that moves",  # it may go on; bos comes first, as in a prompt
        "<|im_start|>why? because<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|><|im_end|>",
    ]
    assert [ids.count(eos) for ids in found] == [0, 1, 2]
    assert found[2][-len(ordinary) - 1 :] == [*ordinary, eos]


def test_they_fit_the_context_and_are_read_only_where_they_are_used(workspace: Workspace, tokenizer: Any) -> None:
    assert max(map(len, preferred_texts(params(loss={"ptx_coef": 1.0}), workspace, tokenizer, 5))) == 5
    assert preferred_texts(params(), workspace, tokenizer, 256) == []
    with pytest.raises(ConfigError, match=r"ppo\.loss\.ptx_coef"):
        preferred_texts(params(loss={"ptx_coef": 1.0}), workspace, tokenizer, 1)


def test_prompts_are_those_of_their_split_and_must_leave_room(workspace: Workspace, tokenizer: Any) -> None:
    found = training_prompts(params(), workspace, tokenizer, 70)
    assert [tokenizer.decode(ids) for ids in found] == [
        "<|im_start|>the film",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert len(training_prompts(params(), workspace, tokenizer, None)) == 2
    with pytest.raises(ConfigError, match="up to 64 tokens and responses of 6 exceed the model's context of 69"):
        training_prompts(params(), workspace, tokenizer, 69)


def test_replies_cut_to_their_beginnings_keep_prompts_and_lose_pairs_that_then_are_the_same(tokenizer: Any) -> None:
    long = "one two three four five six seven eight nine ten"
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    most = len(ids) // 2
    pairs = pd.DataFrame(
        {
            "prompt": "why?",
            "chosen": [long, "short", long + " more"],
            "rejected": ["no", long, long],
            "chosen_tokens": [len(ids) + 3, 4, len(ids) + 4],  # with three of the prompt
            "rejected_tokens": [4, len(ids) + 3, len(ids) + 3],
        },
        index=[7, 8, 9],
    )
    cut = beginnings(pairs, most, tokenizer)
    assert list(cut.index) == [7, 8]
    assert list(cut.chosen) == [tokenizer.decode(ids[:most]), "short"]
    assert list(cut.rejected) == ["no", tokenizer.decode(ids[:most])]
    assert list(cut.chosen_tokens) == [most + 3, 4]
    assert list(cut.rejected_tokens) == [4, most + 3]
    assert list(cut.prompt) == ["why?"] * 2
    assert next(iter(pairs.chosen)) == long, "and what was given stays as it was"
