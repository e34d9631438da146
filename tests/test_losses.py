"""The losses against numbers derived by hand from their equations."""

from __future__ import annotations

import math

import pytest
import torch

from ppo_core.losses import policy_loss, ppo_objective, preference_loss, value_loss

LN2, LN3 = math.log(2), math.log(3)


def test_policy_loss_by_hand():
    # ratios 2, 1/2, 2, 1/2 with advantages 1, 1, -1, -1 and eps 0.2:
    #   A=1,  r=2:   max(-2, -1.2) = -1.2 (clipped branch larger)     A=1,  r=.5: max(-.5, -.8) = -.5
    #   A=-1, r=2:   max(2, 1.2) = 2                                  A=-1, r=.5: max(.5, .8) = .8 (clipped larger)
    logprobs = torch.tensor([[LN2, -LN2, LN2, -LN2, math.nan]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0, math.nan]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, math.nan]])
    mask = torch.tensor([[True] * 4 + [False]])
    result = policy_loss(logprobs, old, advantages, mask, 0.2)
    assert result.loss.item() == pytest.approx((-1.2 - 0.5 + 2 + 0.8) / 4)
    assert result.clip_fraction.item() == pytest.approx(0.5)
    assert result.ratio.item() == pytest.approx(1.25)
    # k3 of old against new: r - 1 - ln r = 1 - ln 2 twice, and ln 2 - 1/2 twice
    assert result.approx_kl.item() == pytest.approx(0.25)
    result.loss.backward()
    # Where the clip binds there is no gradient; elsewhere it is -A r / n.
    expected = torch.tensor([[0.0, -0.5 / 4, 2.0 / 4, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_dual_clip_bounds_the_loss_of_bad_actions():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs, old = torch.tensor([[math.log(10.0), math.log(10.0)]]), torch.zeros(1, 2)
    loss = policy_loss(logprobs, old, torch.tensor([[-1.0, 1.0]]), mask, 0.2, dual_clip=3.0).loss
    assert loss.item() == pytest.approx((3.0 - 1.2) / 2)


def test_micro_batches_add_up():
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    new, old, adv = torch.randn(3, 4, 5).unbind()
    whole = policy_loss(new, old, adv, mask, 0.2).loss
    n = mask.sum()
    parts = [
        policy_loss(new[i : i + 1], old[i : i + 1], adv[i : i + 1], mask[i : i + 1], 0.2, None, n) for i in range(4)
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole)
    whole = value_loss(new, old, adv, mask, 0.2).loss
    parts = [value_loss(new[i : i + 1], old[i : i + 1], adv[i : i + 1], mask[i : i + 1], 0.2, n) for i in range(4)]
    torch.testing.assert_close(sum(p.loss for p in parts), whole)


def test_value_loss_by_hand():
    # v=1, old 0, return 2, eps .2: max((1-2)^2, (.2-2)^2) = 3.24 (clipped); v=1, old 0, return 0: max(1, .04) = 1
    values = torch.tensor([[1.0, 1.0, math.nan]], requires_grad=True)
    result = value_loss(
        values,
        torch.tensor([[0.0, 0.0, 9.0]]),
        torch.tensor([[2.0, 0.0, 9.0]]),
        torch.tensor([[True, True, False]]),
        0.2,
    )
    assert result.loss.item() == pytest.approx(0.5 * (3.24 + 1) / 2)
    assert result.clip_fraction.item() == pytest.approx(0.5)
    result.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.5, 0.0]]))


def test_preference_loss_by_hand():
    # Equal scores: ln 2. A lead of ln 3 means P = 3/4: -ln(3/4). Soft label .25 there: -.25 ln(3/4) - .75 ln(1/4).
    lead = torch.tensor([LN3])
    zero = torch.zeros(1)
    assert preference_loss(zero, zero).item() == pytest.approx(LN2)
    assert preference_loss(lead, zero).item() == pytest.approx(-math.log(0.75))
    assert preference_loss(lead, zero, target=torch.tensor([0.25])).item() == pytest.approx(
        -0.25 * math.log(0.75) - 0.75 * math.log(0.25)
    )
    assert preference_loss(lead, zero, margin=lead).item() == pytest.approx(LN2)


def test_objective_signs():
    total = ppo_objective(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), value_coef=0.5, entropy_coef=0.1)
    assert total.item() == pytest.approx(1 + 0.5 * 2 - 0.1 * 3)


def test_nothing_counted_costs_nothing():
    none = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan)
    assert policy_loss(x, x, x, none, 0.2).loss.item() == 0
    assert value_loss(x, x, x, none, 0.2).loss.item() == 0


def test_rounding_is_no_clipping():
    torch.manual_seed(0)
    old = torch.randn(64, 8) * 1e-3
    values = old + (torch.rand(64, 8) - 0.5) * 0.3  # nowhere 0.2 away
    mask = torch.ones(64, 8, dtype=torch.bool)
    assert value_loss(values, old, torch.randn(64, 8), mask, 0.2).clip_fraction.item() == 0


def test_no_advantage_is_no_loss_however_far_the_ratio():
    result = policy_loss(
        torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), -100.0), torch.zeros(1, 1), torch.ones(1, 1) > 0, 0.2
    )
    assert result.loss.item() == 0


def test_targets_receive_no_gradient():
    mask = torch.ones(2, 3, dtype=torch.bool)
    leaves = [torch.randn(2, 3).requires_grad_() for _ in range(4)]
    loss = policy_loss(leaves[0], leaves[1], leaves[2], mask, 0.2).loss
    (loss + value_loss(leaves[0], leaves[1], leaves[3], mask, 0.2).loss).backward()
    assert leaves[0].grad is not None
    assert [leaf.grad for leaf in leaves[1:]] == [None] * 3


def test_a_mask_of_another_shape_is_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="mask is"):
        policy_loss(x, x, x, torch.ones(1, 2, dtype=torch.bool), 0.2)
