"""KL estimators against exact categorical KL; the controllers by hand; rewards token by token."""

from __future__ import annotations

import math

import pytest
import torch

from ppo_core.kl import AdaptiveKL, FixedKL, kl_estimate
from ppo_core.rewards import shape_rewards

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_is_the_exact_kl(estimator: str):
    exact = (P * (P / Q).log()).sum()
    torch.testing.assert_close((P * kl_estimate(P.log(), Q.log(), estimator)).sum(), exact)


def test_formulas():
    d = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(3), "k1"), d)
    torch.testing.assert_close(kl_estimate(d, torch.zeros(3), "k2"), torch.tensor([0.5, 0.0, 2.0]))
    expected = torch.tensor([math.e - 2, 0.0, math.exp(-2) + 1])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(3), "k3"), expected)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(d, d, "k4")


def test_adaptive_coefficient():
    kl = AdaptiveKL(0.1, target=6.0, horizon=100)
    kl.update(6.6, 10)  # error 0.1: 0.1 * (1 + 0.1 * 0.1)
    assert kl.coef == pytest.approx(0.101)
    kl.update(60.0, 10)  # error clipped to 0.2
    assert kl.coef == pytest.approx(0.101 * 1.02)
    kl.update(0.0, 50)  # clipped to -0.2
    assert kl.coef == pytest.approx(0.101 * 1.02 * 0.9)
    other = AdaptiveKL(9.0, target=6.0, horizon=100)
    other.load_state_dict(kl.state_dict())
    assert other.coef == kl.coef


def test_fixed_coefficient_stays():
    kl = FixedKL(0.2)
    kl.update(100.0, 100)
    assert kl.coef == 0.2


def test_rewards_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0], [math.nan] * 3])
    reference = torch.tensor([[-1.5, -1.0, math.nan], [-1.0, -1.0, -2.0], [math.nan] * 3])
    rewards = shape_rewards(torch.tensor([2.0, -9.0, 0.5]), logprobs, reference, mask, 0.1, score_clip=3.0)
    # Row 1 ends at its second token; row 2 is clipped to -3; row 3 has no token, and is scored at the first position.
    expected = torch.tensor([[-0.05, 0.1 + 2.0, 0.0], [0.0, 0.0, -0.1 - 3.0], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_without_penalty_the_score_is_the_only_reward():
    mask = torch.tensor([[True, False], [True, True]])
    rewards = shape_rewards(torch.tensor([1.0, 2.0]), torch.randn(2, 2), torch.randn(2, 2), mask, 0.0)
    torch.testing.assert_close(rewards, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
