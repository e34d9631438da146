"""The KL term, the dual clip, aggregation and the largest ratio, by hand and against exact laws."""

from __future__ import annotations

import math

import pytest
import torch

from ppo_core.losses import denominators, kl_loss, mean_loss, policy_loss, value_loss

LN2, LN10 = math.log(2), math.log(10)
RAGGED = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_expected_gradient_of_the_kl_loss_is_that_of_the_exact_kl(estimator: str):
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    law = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((law.exp() * (law - reference)).sum(), logits)
    one = torch.ones(1, 1, dtype=torch.bool)
    expected = torch.zeros_like(exact)
    for token, probability in enumerate(law.exp().tolist()):
        loss = kl_loss(logits.log_softmax(0)[token].reshape(1, 1), reference[token].reshape(1, 1), one, estimator)
        expected += probability * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(expected, exact)
    assert exact.abs().max() > 0.05


def test_the_value_of_the_kl_loss_is_that_of_the_estimator():
    # d = ln 2 and -ln 2, mean over the two tokens that count.
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]])
    reference = torch.tensor([[-1.0 - LN2, -2.0 + LN2, math.nan]])
    mask = torch.tensor([[True, True, False]])
    assert kl_loss(logprobs, reference, mask, "k1").item() == pytest.approx(0, abs=1e-7)
    assert kl_loss(logprobs, reference, mask, "k2").item() == pytest.approx(LN2**2 / 2)
    # exp(-ln 2) - 1 + ln 2 and exp(ln 2) - 1 - ln 2 add up to 1/2.
    assert kl_loss(logprobs, reference, mask, "k3").item() == pytest.approx(0.25)
    assert kl_loss(logprobs, reference, mask, "k3", denominator=4).item() == pytest.approx(0.125)


def test_the_reference_receives_no_gradient_from_the_kl_loss():
    logprobs, reference = (torch.randn(1, 2).requires_grad_() for _ in range(2))
    kl_loss(logprobs, reference, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert logprobs.grad is not None
    assert reference.grad is None


def test_denominators_by_hand():
    assert denominators(RAGGED, "tokens").tolist() == 7
    # 3 responses of 4, 2 and 1 tokens: each token's share of its response's share.
    assert denominators(RAGGED, "sequences").tolist() == [[12], [6], [3]]
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert denominators(nothing, "tokens").tolist() == 1
    assert denominators(nothing, "sequences").tolist() == [[2], [2]]
    with pytest.raises(ValueError, match="'words'; choose tokens or sequences"):
        denominators(RAGGED, "words")


def test_each_aggregation_is_the_mean_that_it_says():
    loss = torch.tensor([[1.0, 2.0, 3.0, 6.0], [4.0, 8.0, math.nan, math.nan], [9.0, math.nan, math.nan, math.nan]])
    over_tokens = mean_loss(loss, RAGGED, denominators(RAGGED, "tokens"))
    assert over_tokens.item() == pytest.approx((12 + 12 + 9) / 7)
    assert mean_loss(loss, RAGGED).item() == pytest.approx((12 + 12 + 9) / 7)
    over_sequences = mean_loss(loss, RAGGED, denominators(RAGGED, "sequences"))
    assert over_sequences.item() == pytest.approx((3 + 6 + 9) / 3)


@pytest.mark.parametrize("aggregation", ["tokens", "sequences"])
def test_every_loss_divides_by_what_it_is_given(aggregation: str):
    torch.manual_seed(1)
    new, old, target = torch.randn(3, 3, 4).unbind()
    denominator = denominators(RAGGED, aggregation)
    shares = RAGGED / denominator
    ratio = (new - old).exp()
    surrogate = torch.maximum(-target * ratio, -target * ratio.clamp(0.8, 1.2))
    policy = policy_loss(new, old, target, RAGGED, 0.2, denominator=denominator).loss
    torch.testing.assert_close(policy, (surrogate * shares).sum())
    error = torch.maximum((new - target) ** 2, (new.clamp(old - 0.2, old + 0.2) - target) ** 2) / 2
    value = value_loss(new, old, target, RAGGED, 0.2, denominator=denominator).loss
    torch.testing.assert_close(value, (error * shares).sum())
    kl = kl_loss(new, old, RAGGED, "k2", denominator)
    torch.testing.assert_close(kl, ((new - old) ** 2 / 2 * shares).sum())


def test_the_largest_ratio_is_that_of_a_token_that_counts():
    logprobs = torch.tensor([[LN2, math.log(3.0), 50.0], [math.log(5.0), -9.0, math.nan]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    result = policy_loss(logprobs, torch.zeros(2, 3), torch.ones(2, 3), mask, 0.2)
    assert result.ratio_max.item() == pytest.approx(5)
    assert result.ratio.item() == pytest.approx((2 + 3 + 5 + math.exp(-9)) / 4)
    # A token without an advantage has a ratio all the same.
    assert policy_loss(logprobs, torch.zeros(2, 3), torch.zeros(2, 3), mask, 0.2).ratio_max.item() == pytest.approx(5)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert policy_loss(logprobs, torch.zeros(2, 3), torch.ones(2, 3), nothing, 0.2).ratio_max.item() == 0


def test_beyond_the_dual_clip_a_bad_action_has_no_gradient():
    # A = -1 at ratios 10 (bound by 3), 2 (not bound); A = 1 at ratio 1/10, which no clip touches.
    logprobs = torch.tensor([[LN10, LN2, -LN10]], requires_grad=True)
    advantages, mask = torch.tensor([[-1.0, -1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    result = policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, 0.2, dual_clip=3.0)
    assert result.loss.item() == pytest.approx((3 + 2 - 0.1) / 3)
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 2 / 3, -0.1 / 3]]))


def test_a_good_action_whose_ratio_overflows_has_no_gradient():
    # exp(100) is infinite in float32; the clipped branch is the loss, and its gradient is 0, not 0 x inf.
    logprobs = torch.tensor([[100.0, 0.0]], requires_grad=True)
    result = policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.2)
    assert result.loss.item() == pytest.approx(-(1.2 + 1) / 2)
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.5]]))


def test_a_bad_action_whose_ratio_overflows_is_infinitely_bad_unless_the_dual_clip_bounds_it():
    logprobs, one = torch.tensor([[100.0]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    assert policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1), one, 0.2).loss.item() == math.inf
    bounded = policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1), one, 0.2, dual_clip=3.0).loss
    bounded.backward()
    assert (bounded.item(), logprobs.grad.item()) == (3, 0)
