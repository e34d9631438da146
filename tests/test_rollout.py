"""What is written down of responses: scores of the text alone, whatever pads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from runs import EOS, PAD, PROMPTS, config, draw

from ppo_core.decoder import load_causal_lm, split
from ppo_core.models import ActorCritic
from ppo_core.rollout import ModelReward
from ppo_core.scorers import RewardModel, score_texts


def test_the_reward_model_reads_the_same_in_a_padded_batch_and_before_eos(policy_folder: Path):
    torch.manual_seed(3)
    base = load_causal_lm(policy_folder, torch.float32)
    scorer = RewardModel(*split(base, 2), 64, PAD)
    torch.nn.init.normal_(scorer.head.linear.weight)
    model = ActorCritic(base, config().model)
    samples = draw(model, PROMPTS)
    sequences = samples.sequences
    last = sequences.prompt_length + sequences.mask.sum(dim=1) - 1
    sequences.tokens[0, last[0]] = EOS  # one ends, the others are cut
    lengths = sequences.mask.sum(dim=1) - torch.tensor([1, 0, 0, 0])
    samples = replace(samples, ended=torch.tensor([True, False, False, False]), text_lengths=lengths)
    found = ModelReward(scorer, model)(samples, model.activations(sequences))
    texts = [tokens[mask].tolist() for tokens, mask in zip(sequences.tokens, sequences.attention, strict=True)]
    texts[0] = texts[0][:-1]
    expected = torch.cat([scorer.raw([text]) for text in texts])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(score_texts(scorer, texts), expected, atol=1e-5, rtol=0)  # buckets keep the order
