"""Numbers that are not finite end training before they reach a weight; signs of collapse warn, then end it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy import equal, id_sum, toy_config, toy_trainer, weights_of

from ppo_core.config import HealthConfig
from ppo_core.errors import TrainingHealthError
from ppo_core.health import Health, refuse_non_finite, symptoms
from ppo_core.trainer import Trainer
from ppo_core.types import Experience, Samples

WELL = {"score_std": 1.0, "empty": 0.0, "entropy": 2.0, "length": 5.0, "repetition": 0.1, "sampler_gap": 0.01}
SICK = {
    "constant reward": ({"score_std": 0.0}, "reward model"),
    "empty responses": ({"empty": 5.0}, "ppo.sampling.min_new_tokens"),
    "collapsed policy": ({"entropy": 0.01}, "ppo.loss.entropy_coef"),
    "collapsed length": ({"length": 1.2}, "ppo.sampling.min_new_tokens"),
    "repetition": ({"repetition": 0.6}, "ppo.reward.kl_coef"),
    "sampler apart": ({"sampler_gap": 0.3}, "ppo.health.max_sampler_gap"),
}


@pytest.mark.fault("15: a score that is no number, in training", expected="exit 7 before the step; where, and whose")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_ends_training_and_names_its_responses(value: float):
    def reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
        scores = id_sum(samples, activations)
        # Recognised by what they say, wherever they stand in a micro-batch.
        bad = [r for r, tokens in enumerate(samples.sequences.tokens.tolist()) if tokens[-6:] in spoilt]
        scores[bad] = value
        return scores

    t = toy_trainer(toy_config(iterations=2, sampling={"min_new_tokens": 6}), reward)
    spoilt: list[list[int]] = []
    t.step()
    t.iteration = 3
    spoilt += t.sample().sequences.responses[[1, 4]].tolist()
    before = weights_of(t)
    with pytest.raises(TrainingHealthError) as caught:
        t.step()
    (problem,) = caught.value.problems
    assert problem.where == "cycle 2, iteration 4, responses 2, 5 of the rollout"
    assert problem.what == "scores are not finite"
    assert "reward" in problem.mend
    assert equal(weights_of(t), before)


@pytest.mark.fault("15: a weight that is no number, in training", expected="exit 7 before the step; where, and whose")
@pytest.mark.parametrize(("spoil", "what"), [
    (lambda t: t.model.value_head.linear.weight, "values are not finite"),
    (lambda t: t.model.policy_head.linear.weight, "log-probabilities are not finite"),
    (lambda t: t.model.reference_head.linear.weight, "reference log-probabilities are not finite"),
])  # fmt: skip
def test_a_weight_that_is_no_number_is_seen_in_the_rollout(spoil, what: str):
    t = toy_trainer(toy_config())
    with torch.no_grad():
        spoil(t)[0, 3] = math.nan
    before = weights_of(t)
    with pytest.raises(TrainingHealthError, match=f"cycle 1, iteration 1, responses 1, 2, .*{what}"):
        t.step()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(weights_of(t), before, strict=True))


def test_what_no_mask_counts_may_be_no_number():
    t = toy_trainer(toy_config())
    rollout = t.roll_out()
    dirt = torch.where(rollout.mask, 0.0, math.nan)
    assert dirt.isnan().any()
    per_token = ("logprobs", "ref_logprobs", "values", "entropy")
    dirty = replace(rollout, **{name: getattr(rollout, name) + dirt for name in per_token})
    refuse_non_finite(dirty, "")
    found = []
    for sampled in (rollout, dirty):
        fresh = toy_trainer(toy_config())
        fresh.optimiser.update(fresh.estimate(sampled), seed=0, iteration=0, kl_coef=0.1)
        found.append(weights_of(fresh))
    assert equal(*found)


def minibatch_of(t: Trainer, epoch: int, k: int) -> list[int]:
    """The rows of a minibatch, counted from 1."""
    seen: list[list[int]] = []
    gather = t.optimiser._gather

    def record(experience: Experience, index: torch.Tensor, *rest: Any) -> dict[str, float]:
        seen.append(index.tolist())
        return gather(experience, index, *rest)

    t.optimiser._gather = record
    t.step()
    return sorted(row + 1 for row in seen[epoch * t.config.update.minibatches + k])


@pytest.mark.fault("15: a gradient that is no number, in training", expected="exit 7 before the step; where, and whose")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_ends_training_before_the_step(value: float):
    config = toy_config(update={"micro_batch": 8})
    steps: list[list[torch.Tensor]] = []
    t = toy_trainer(config)
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(gradient, value) if calls == 4 else gradient

    next(iter(t.model.policy_weights().values())).register_hook(spoil)
    adam = t.optimiser.adam.step
    t.optimiser.adam.step = lambda: (adam(), steps.append(weights_of(t)))
    with pytest.raises(TrainingHealthError) as caught:
        t.step()
    (problem,) = caught.value.problems
    rows = ", ".join(map(str, minibatch_of(toy_trainer(config), epoch=1, k=1)))
    assert problem.where == f"cycle 1, iteration 1, epoch 2, minibatch 2, responses {rows} of the rollout"
    assert "the gradient's norm is" in problem.what
    assert problem.mend == "lower ppo.update.learning_rate"
    assert len(steps) == 3
    assert equal(weights_of(t), steps[-1])
    assert t.iteration == 0


@pytest.mark.fault("15: a loss that is no number, in training", expected="exit 7 before the step; where, and whose")
def test_a_loss_that_is_no_number_ends_training_before_the_step():
    t = toy_trainer(toy_config(update={"micro_batch": 1}))
    experience = t.estimate(t.roll_out())
    experience.advantages[5, 0] = math.nan
    before = weights_of(t)
    steps = []
    adam = t.optimiser.adam.step
    t.optimiser.adam.step = lambda: (adam(), steps.append(weights_of(t)))
    with pytest.raises(TrainingHealthError, match=r"minibatch [12], responses 6 of the rollout — the loss is nan"):
        t.optimiser.update(experience, seed=3, iteration=0, kl_coef=0.1)
    assert equal(weights_of(t), steps[-1] if steps else before)
    assert len(steps) < 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.fault(
                f"{17 if name == 'empty responses' else 16}: {name}", expected="warned, then exit 7 with what to change"
            ),
        )
        for name in SICK
    ],
)
def test_each_sign_warns_then_ends_training_and_names_what_to_change(name: str, caplog: pytest.LogCaptureFixture):
    signs, mend = SICK[name]
    health = Health(HealthConfig(patience=3))
    assert symptoms(WELL | signs, 8, health.config).keys() == {name}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            health.check(WELL | signs, 8, "cycle 1, iteration 7")
    assert [name in message and mend in message for message in caplog.messages] == [True, True]
    health.check(WELL, 8, "")  # a good iteration: the count starts anew
    for _ in range(2):
        health.check(WELL | signs, 8, "")
    with pytest.raises(TrainingHealthError) as caught:
        health.check(WELL | signs, 8, "cycle 2, iteration 9")
    (problem,) = caught.value.problems
    assert problem.what == f"{name}, 3 iterations in a row"
    assert problem.where == "cycle 2, iteration 9"
    assert mend in problem.mend


def test_limits_are_those_of_the_configuration_and_what_reaches_them_is_well():
    strict = HealthConfig(min_score_std=0.5, min_entropy=1.5, min_length=3.0, max_repetition=0.25, max_sampler_gap=0.5)
    edge = {"score_std": 0.5, "empty": 4.0, "entropy": 1.5, "length": 3.0, "repetition": 0.25, "sampler_gap": 0.5}
    assert symptoms(edge, 8, strict) == {}
    beyond = {"score_std": 0.49, "empty": 5.0, "entropy": 1.49, "length": 2.9, "repetition": 0.26, "sampler_gap": 0.51}
    assert symptoms(beyond, 8, strict).keys() == SICK.keys()


def test_two_signs_keep_their_own_count():
    health = Health(HealthConfig(patience=2))
    health.check(WELL | {"score_std": 0.0}, 8, "")
    health.check(WELL | {"entropy": 0.0}, 8, "")
    with pytest.raises(TrainingHealthError, match="collapsed policy, 2 iterations"):
        health.check(WELL | {"score_std": 0.0, "entropy": 0.0}, 8, "")


def test_a_sick_iteration_ends_before_its_update():
    t = toy_trainer(toy_config(health={"patience": 2}), lambda samples, _: torch.ones(len(samples.sequences)))
    t.step()  # warned
    before = weights_of(t)
    with pytest.raises(TrainingHealthError, match="cycle 1, iteration 2 — constant reward, 2 iterations in a row"):
        t.step()
    assert equal(weights_of(t), before)
