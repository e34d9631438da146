"""Log-probabilities and entropies against exact laws."""

from __future__ import annotations

import math

import torch

from ppo_core.logprobs import logprobs_and_entropy, token_entropy, token_logprobs

LAW = torch.tensor([0.5, 0.25, 0.125, 0.125])


def test_known_law():
    logits = LAW.log().expand(1, 4, 4)
    tokens = torch.arange(4).unsqueeze(0)
    torch.testing.assert_close(token_logprobs(logits, tokens), LAW.log().unsqueeze(0))
    # 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8 = 1.75 ln 2
    torch.testing.assert_close(token_entropy(logits), torch.full((1, 4), 1.75 * math.log(2)))


def test_temperature_divides_the_logits():
    # p^2 normalised: 1/4, 1/16, 1/64, 1/64 over 11/32
    cold = LAW**2 / (LAW**2).sum()
    logits = LAW.log().expand(1, 1, 4)
    torch.testing.assert_close(token_logprobs(logits, torch.tensor([[1]]), 0.5), cold.log()[1].reshape(1, 1))
    torch.testing.assert_close(token_entropy(logits, 0.5), -(cold * cold.log()).sum().reshape(1, 1))


def test_impossible_tokens_are_inert():
    logits = torch.tensor([[[0.0, 0.0, -math.inf, -200.0]]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([[0]]), 1.0)
    torch.testing.assert_close(entropy, torch.full((1, 1), math.log(2)))
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_float32_from_bfloat16():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16)
    assert token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32
    assert token_entropy(logits).dtype == torch.float32
