"""Plain functions as rewards: what they are handed, and what may come back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from runs import padded
from transformers import AutoTokenizer

from ppo_core.rollout import FunctionReward
from ppo_core.tokens import decode, encode_prompt, encode_response
from ppo_core.types import Samples, Sequences, pad_prompts

TEXTS = [
    ("the film was", " decent.", ["<|im_end|>"]),  # ended by EOS
    ("a", " naïve – 日本", []),  # cut
    ("so <|im_end|> was forged", " and\n\nstopped\n", []),  # ended by a stop string, which is text
    (" spaces ", "", ["Ġfilm"]),  # a stop token at once, which would read as text
]


@pytest.fixture(scope="module")
def tokenizer(policy_folder):
    return AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def samples(tokenizer) -> Samples:
    """`TEXTS` as sampled: padding equal to EOS on both sides."""
    asked = [encode_prompt(tokenizer, prompt, "text") for prompt, _, _ in TEXTS]
    prompts, attention = pad_prompts(asked, tokenizer.pad_token_id, torch.device("cpu"))
    ends = [tokenizer.convert_tokens_to_ids(end) for *_, end in TEXTS]
    said = [encode_response(tokenizer, r) for _, r, _ in TEXTS]
    width = max(len(ids) for ids in said) + 1
    tokens = torch.full((len(TEXTS), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(TEXTS), width, dtype=torch.bool)
    for row, ids in enumerate(said):
        whole = [*ids, *ends[row]]
        tokens[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), True
    sequences = Sequences(torch.cat([prompts, tokens], 1), torch.cat([attention, mask], 1), prompts.shape[1])
    lengths = torch.tensor([len(ids) for ids in said])
    return Samples(padded(sequences, left=2, right=0), torch.zeros(len(TEXTS), width), lengths > 0, lengths)


def reward(tokenizer, function) -> FunctionReward:
    return FunctionReward(function, partial(decode, tokenizer), partial(decode, tokenizer))


def test_a_function_is_handed_prompts_and_responses_as_they_were_written(samples: Samples, tokenizer):
    handed = []

    def function(prompts: list[str], responses: list[str]) -> list[float]:
        handed.append((prompts, responses))
        return [3, 0.5, -1, 2]

    scores = reward(tokenizer, function)(samples, samples.sequences.tokens)
    assert handed == [([p for p, _, _ in TEXTS], [r for _, r, _ in TEXTS])]
    assert (scores.tolist(), scores.dtype) == ([3.0, 0.5, -1.0, 2.0], torch.float32)


@pytest.mark.parametrize("n", [0, 3, 5])
def test_a_function_that_returns_another_number_of_scores_is_refused(n: int, samples: Samples, tokenizer):
    with pytest.raises(ValueError, match=f"returned {n} scores for 4 responses"):
        reward(tokenizer, lambda prompts, responses: [0.0] * n)(samples, samples.sequences.tokens)
