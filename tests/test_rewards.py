"""From scores to rewards: penalties by hand, running moments against numpy, the order of steps, where the KL acts."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from toy import EOS, toy_config, toy_trainer

from ppo_core.config import RewardConfig
from ppo_core.masking import masked_mean, masked_var
from ppo_core.rewards import RunningMoments, penalise, shape_rewards
from ppo_core.trainer import Trainer
from ppo_core.types import Rollout, Sequences

MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])
ENDED = torch.tensor([False, True, True])
SCORES = torch.tensor([1.0, 3.0, -2.0])


def rollout(scores: torch.Tensor = SCORES, apart: float = 0.0) -> Rollout:
    """Responses of 4, 2 and 1 tokens, cut, ended and ended, the policy `apart` nats from its reference on each."""
    tokens = torch.cat([torch.full((3, 1), 3), torch.where(MASK, EOS, 0)], dim=1)
    sequences = Sequences(tokens, torch.cat([torch.ones(3, 1, dtype=torch.bool), MASK], dim=1), prompt_length=1)
    logprobs = torch.full((3, 4), -1.5)
    return Rollout(
        sequences, tokens, logprobs, logprobs - apart, torch.zeros(3, 4), torch.ones(3, 4), scores, ended=ENDED
    )


def trainer(**reward) -> Trainer:
    return toy_trainer(
        toy_config(
            sampling={"max_new_tokens": 4},
            reward={"kl_in": "none", "score_clip": None} | reward,
            advantages={"gamma": 1.0, "lam": 1.0, "whiten": False},
        )
    )


def returns(t: Trainer, sampled: Rollout) -> torch.Tensor:
    """What each response is worth in all: with values of 0, gamma and lambda of 1, the first token's return."""
    return t.estimate(sampled).returns[:, 0]


def test_penalties_by_hand():
    lengths = torch.tensor([4, 2, 1])
    plain = penalise(SCORES, lengths, ENDED, RewardConfig(), 4)
    assert plain.tolist() == SCORES.tolist()
    missing = penalise(SCORES, lengths, ENDED, RewardConfig(missing_eos_penalty=0.5), 4)
    assert missing.tolist() == [0.5, 3.0, -2.0]
    long = penalise(SCORES, lengths, ENDED, RewardConfig(length_penalty=0.25), 4)
    assert long.tolist() == [0.0, 2.5, -2.25]
    both = penalise(SCORES, lengths, ENDED, RewardConfig(missing_eos_penalty=0.5, length_penalty=0.25), 4)
    assert both.tolist() == [-0.5, 2.5, -2.25]


def test_the_overlong_penalty_is_equation_13_of_dapo():
    # L_max 10, L_cache 4. R = 0 to 6 tokens, ((L_max - L_cache) - length) / L_cache to 10, which is -1.
    lengths = torch.tensor([1, 6, 7, 8, 10])
    none = torch.zeros(5)
    penalised = penalise(none, lengths, torch.ones(5, dtype=torch.bool), RewardConfig(overlong_buffer=4), 10)
    assert penalised.tolist() == [0, 0, -0.25, -0.5, -1]


def test_penalties_read_lengths_and_ends_of_the_rollout():
    t = trainer(missing_eos_penalty=0.5, length_penalty=0.25, overlong_buffer=2)
    # Lengths 4, 2, 1 of at most 4: the first is 2 over, of 2.
    assert returns(t, rollout()).tolist() == [1 - 0.5 - 1 - 1, 3 - 0.5, -2 - 0.25]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_together(batches: list[list[float]]):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    seen = np.concatenate([np.array(batch) for batch in batches])
    assert moments.count == len(seen)
    assert moments.mean == pytest.approx(seen.mean(), abs=1e-9)
    assert moments.squares == pytest.approx(((seen - seen.mean()) ** 2).sum(), abs=1e-6)
    scores = torch.tensor([-1.0, 0.0, 7.0], dtype=torch.float64)
    if seen.std() > 1e-3:
        expected = (scores.numpy() - seen.mean()) / seen.std()
        np.testing.assert_allclose(moments.normalise(scores).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_scores_that_are_all_equal_are_normal():
    moments = RunningMoments()
    assert moments.normalise(torch.tensor([3.0])).tolist() == [0]  # nothing seen yet
    moments.update(torch.tensor([5.0, 5.0]))
    assert moments.normalise(torch.tensor([5.0, 6.0])).tolist() == [0, 0]


def test_scores_are_normalised_then_penalised_then_clipped():
    t = trainer(normalise=True, missing_eos_penalty=1.0, score_clip=1.5)
    t.moments.update(torch.tensor([0.0, 4.0]))  # mean 2, standard deviation 2
    # Only the first was cut. (4 - 2) / 2 - 1 = 0: penalised first it were .5, clipped first -1.25.
    assert returns(t, rollout(torch.tensor([4.0, 3.0, -2.0]))).tolist() == [0, 0.5, -1.5]
    # (9 - 2) / 2 - 1 = 2.5, clipped: clipped before the penalty it were .5.
    assert returns(t, rollout(torch.tensor([9.0, 3.0, -2.0]))).tolist() == [1.5, 0.5, -1.5]


def test_without_normalisation_the_moments_change_nothing():
    t = trainer()
    t.moments.update(torch.tensor([0.0, 4.0]))
    assert returns(t, rollout()).tolist() == SCORES.tolist()


def test_an_iteration_is_normalised_by_all_scores_to_date_its_own_included():
    t = trainer(normalise=True)
    t.moments.update(torch.tensor([7.0, -3.0, 0.0]))
    own = t.roll_out().scores
    t.step()
    seen = np.concatenate([[7.0, -3.0, 0.0], own.numpy()])
    assert t.moments.count == len(seen)
    assert t.moments.mean == pytest.approx(seen.mean(), rel=1e-6)


def test_whitened_rewards_have_variance_1_and_keep_their_mean():
    plain = trainer(kl_in="reward", kl_coef=0.1)
    white = trainer(kl_in="reward", kl_coef=0.1, whiten=True)
    sampled = rollout(apart=1.0)
    expected = shape_rewards(SCORES, sampled.logprobs, sampled.ref_logprobs, MASK, 0.1)
    mean, std = masked_mean(expected, MASK), masked_var(expected, MASK).sqrt()
    # Undiscounted returns are sums of rewards to come.
    torch.testing.assert_close(plain.estimate(sampled).returns[0, 0], expected[0].sum())
    found = white.estimate(sampled).returns
    torch.testing.assert_close(found[0, 0], ((expected[0] - mean) / std + mean).sum())
    rewards = found - torch.cat([found[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(masked_mean(rewards, MASK), mean)
    torch.testing.assert_close(masked_var(rewards, MASK), torch.tensor(1.0), rtol=1e-4, atol=0)


def gradient(t: Trainer, sampled: Rollout, kl_coef: float) -> torch.Tensor:
    """Of the update, from advantages of 0: of the policy's weights, what no advantage moves."""
    experience = t.estimate(sampled)
    still = type(experience)(sampled, torch.zeros_like(experience.advantages), sampled.values)
    t.optimiser._gather(still, torch.arange(len(sampled)), kl_coef, "")
    return torch.cat([p.grad.flatten() for p in t.model.policy_weights().values()])


@pytest.mark.parametrize(("kl_in", "in_reward", "in_loss"), [
    ("reward", True, False), ("loss", False, True), ("none", False, False),
])  # fmt: skip
def test_the_kl_acts_in_exactly_one_place(kl_in: str, in_reward: bool, in_loss: bool):
    config = toy_config(
        reward={"kl_in": kl_in, "kl_coef": 0.5}, loss={"entropy_coef": 0.0, "value_coef": 0.0}, update={"epochs": 1}
    )
    t = toy_trainer(config)
    sampled = t.roll_out()
    apart = type(sampled)(**(vars(sampled) | {"ref_logprobs": sampled.logprobs - 1.0}))
    differ = (t.estimate(apart).returns - t.estimate(sampled).returns).abs().max() > 0.1
    assert bool(differ) is in_reward
    assert bool(gradient(t, apart, 0.5).abs().max() > 1e-4) is in_loss


def test_the_loss_takes_the_controllers_coefficient_and_so_does_the_reward():
    config = toy_config(reward={"kl_in": "loss"}, loss={"entropy_coef": 0.0, "value_coef": 0.0})
    gradients = []
    for kl_coef in (0.5, 1.0):
        t = toy_trainer(config)
        sampled = t.roll_out()
        apart = type(sampled)(**(vars(sampled) | {"ref_logprobs": sampled.logprobs - 1.0}))
        gradients.append(gradient(t, apart, kl_coef))
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-4, atol=1e-6)
    t = trainer(kl_in="reward", kl_coef=0.5)
    t.kl.coef = 0.25  # as an adaptive controller would
    assert returns(t, rollout(apart=1.0)).tolist() == [1 - 4 * 0.25, 3 - 2 * 0.25, -2 - 0.25]


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_adaptive_coefficient_is_fed_the_sequence_sum(kl_in: str):
    # A target of 6 nats a response: the mean over responses of the sum over tokens is what is compared with it.
    config = toy_config(reward={"kl_in": kl_in, "kl_coef": 0.1, "kl_target": 6.0, "kl_horizon": 100})
    t = toy_trainer(config)
    fed: list[tuple[float, int]] = []
    t.kl.update = lambda kl, n: fed.append((kl, n))
    with torch.no_grad():
        for p in t.model.policy_weights().values():
            p.add_(0.05)
    sampled = t.roll_out()
    expected = (((sampled.logprobs - sampled.ref_logprobs) * sampled.mask).sum(dim=1)).mean()
    t.step()
    assert fed == [(pytest.approx(float(expected), rel=1e-5), len(sampled))]
    assert abs(float(expected)) > 1e-3
