"""GAE against its definition as a double sum (equation 16), in float64, and by hand."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from ppo_core.advantages import gae


def oracle(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, each delta from the definition; O(T^2), one response."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


numbers = st.floats(-5, 5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 4)
)
def test_recursion_equals_the_double_sum(steps, gamma: float, lam: float, padding: int):
    rewards, values = (list(column) for column in zip(*steps, strict=True))
    mask = torch.tensor([[True] * len(steps) + [False] * padding])
    # What lies behind the end is NaN: it must neither leak in nor come out.
    padded = [torch.tensor([x + [math.nan] * padding], dtype=torch.float64) for x in (rewards, values)]
    advantages, returns = gae(*padded, mask, gamma, lam)
    expected = torch.tensor(oracle(rewards, values, gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(advantages[0, : len(steps)], expected)
    torch.testing.assert_close(returns[0, : len(steps)], expected + torch.tensor(values, dtype=torch.float64))
    assert (advantages[0, len(steps) :] == 0).all()
    assert (returns[0, len(steps) :] == 0).all()


def test_by_hand():
    # delta_2 = 1 - 0.5 = 0.5; delta_1 = 0 + 0.9 * 0.5 - 0.25 = 0.2; A_1 = 0.2 + 0.9 * 0.8 * 0.5 = 0.56
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 0.5]]), torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.56, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.81, 1.0]]))


def test_dtypes():
    mask = torch.ones(1, 3, dtype=torch.bool)
    for given_dtype, expected in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        x = torch.ones(1, 3, dtype=given_dtype)
        assert [t.dtype for t in gae(x, x, mask, 1.0, 1.0)] == [expected] * 2
