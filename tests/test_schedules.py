"""The course of learning rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import PAD, PROMPTS, equal, toy_config, toy_model, toy_trainer, weights_of

from ppo_core.decoder import split
from ppo_core.preferences import Pairs, fit
from ppo_core.schedules import learning_rate_factor
from ppo_core.scorers import RewardModel


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
    # From step 3 to 7 in four equal parts; then 0.
    ("linear", [1 / 3, 2 / 3, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
    ("cosine", [1 / 3, 2 / 3, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]),
])  # fmt: skip
def test_schedules_by_hand(schedule: str, expected: list[float]):
    found = [learning_rate_factor(schedule, step, warmup=3, horizon=7) for step in range(9)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_schedules_at_their_ends():
    assert learning_rate_factor("linear", 0, warmup=0, horizon=4) == 1
    assert learning_rate_factor("cosine", 5, warmup=5, horizon=5) == 1  # a horizon within the warm-up
    with pytest.raises(ValueError, match="'step'; choose constant, linear or cosine"):
        learning_rate_factor("step", 0, warmup=0, horizon=1)


def test_each_of_policy_and_critic_has_its_rate_and_its_course():
    update = {
        "learning_rate": 0.4, "critic_learning_rate": 0.2, "schedule": "linear", "critic_schedule": "cosine",
        "schedule_iterations": 6, "warmup_iterations": 2,
    }  # fmt: skip
    t = toy_trainer(toy_config(update=update))
    rates = []
    for iteration in range(7):
        t.optimiser._set_learning_rates(iteration)
        rates.append([group["lr"] for group in t.optimiser.adam.param_groups])
    half = math.sqrt(0.5)
    policy = [0.2, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0]
    critic = [0.1, 0.2, 0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half), 0.0]
    assert rates == [pytest.approx(pair) for pair in zip(policy, critic, strict=True)]
    assert [len(group["params"]) for group in t.optimiser.adam.param_groups] == [len(t.model.policy_weights()), 2]


def test_a_learning_rate_that_has_fallen_to_0_moves_nothing():
    t = toy_trainer(toy_config(update={"schedule": "cosine", "critic_schedule": "linear", "schedule_iterations": 1}))
    t.step()
    t.iteration = 1
    before = weights_of(t)
    t.step()
    assert equal(weights_of(t), before)


def test_preference_training_warms_up_and_falls_along_a_cosine(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    scorer = RewardModel(*split(toy_model(), 1), 16, PAD)
    torch.nn.init.normal_(scorer.head.linear.weight)
    rates = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    pairs = Pairs(texts=PROMPTS, chosen=[0, 2], rejected=[1, 3], target=[1.0, 1.0])
    fit(scorer, pairs, steps=20, batch_pairs=2, learning_rate=0.5, weight_decay=0.0, seed=0, on_step=lambda *_: None)
    # Two steps of warm-up, a tenth of 20; then half a cosine over the other 18.
    expected = [0.25, 0.5] + [0.25 * (1 + math.cos(math.pi * k / 18)) for k in range(18)]
    assert rates == pytest.approx(expected)
