"""Policies that must learn, each against an optimum known beforehand."""

from __future__ import annotations

import pytest
import torch
from toy import EOS, STOP, VOCABULARY, toy_config, toy_model, toy_trainer

from ppo_core.config import PPOConfig
from ppo_core.trainer import Trainer
from ppo_core.types import Experience, Rollout, Samples

SEEDS = (1, 2, 3)
PROMPT = [3, 4]
GAINS = torch.tensor([0.0, 1.0, -0.5, 0.5, 0.8, -1.0, 0.2, 0.9, -0.2, 0.0, 0.6, -0.8])
"""What each token is worth to the bandit."""


def law_after(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """The law [V] of the next token."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].softmax(dim=-1)


def policy_law(t: Trainer, prompt: list[int]) -> torch.Tensor:
    plain = toy_model()
    plain.load_state_dict({name: p.detach() for name, p in t.model.policy_weights().items()}, strict=False)
    return law_after(plain, prompt)


# A bandit over tokens: max E[r] - beta KL(pi || pi_ref) has the optimum pi* ~ pi_ref exp(r / beta).

BETA = 0.4


def bandit_reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    return GAINS[samples.sequences.responses[:, 0]]


def bandit(kl_in: str, seed: int) -> Trainer:
    config = toy_config(
        rollout_size=128, sampling={"max_new_tokens": 1}, advantages={"whiten": False},
        reward={"kl_in": kl_in, "kl_coef": BETA}, loss={"entropy_coef": 0.0, "value_coef": 0.5},
        update={"epochs": 3, "minibatches": 1, "micro_batch": 128, "learning_rate": 8e-3, "schedule": "linear",
                "schedule_iterations": 30},
    )  # fmt: skip
    return toy_trainer(config, bandit_reward, prompts=[PROMPT], seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_bandit_finds_the_law_that_weighs_reward_against_kl(kl_in: str, seed: int):
    reference = law_after(toy_model(), PROMPT)
    best = reference * (GAINS / BETA).exp()
    best = best / best.sum()
    t = bandit(kl_in, seed)

    def objective(law: torch.Tensor) -> float:
        return float((law * GAINS).sum() - BETA * (law * (law / reference).log()).sum())

    def away(law: torch.Tensor) -> float:
        return float((law - best).abs().sum() / 2)

    for _ in range(26):
        t.step()
    found = policy_law(t, PROMPT)
    greedy = torch.nn.functional.one_hot(GAINS.argmax(), VOCABULARY)
    # It starts far from the optimum; greed, which a lost penalty would leave, is far from it, too.
    assert min(away(reference), away(greedy)) > 0.35
    assert away(found) < 0.1
    assert objective(best) - objective(found) < 0.05 * (objective(best) - objective(reference))


# A delayed reward: the first of four tokens decides, the last is paid.

LENGTH, WANTED = 4, (5, 9)


def first_token_reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    return torch.isin(samples.sequences.responses[:, 0], torch.tensor(WANTED)).float()


class Shuffled(Trainer):
    """Learns from advantages that belong to other responses."""

    def estimate(self, rollout: Rollout) -> Experience:
        experience = super().estimate(rollout)
        order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(self.iteration))
        return Experience(rollout, experience.advantages[order], experience.returns)


def delayed(seed: int, gamma: float = 1.0) -> PPOConfig:
    return toy_config(
        rollout_size=64, sampling={"max_new_tokens": LENGTH, "min_new_tokens": LENGTH},
        reward={"kl_in": "none"}, advantages={"gamma": gamma, "lam": 0.95}, loss={"entropy_coef": 0.0},
        update={"epochs": 2, "minibatches": 2, "micro_batch": 32, "learning_rate": 5e-3},
        health={"patience": 1000, "min_score_std": 0.0},
    )  # fmt: skip


def success(t: Trainer) -> float:
    """The exact probability that a response is rewarded."""
    law = policy_law(t, PROMPT)
    law[[EOS, STOP]] = 0  # not before the last position
    return float(law[list(WANTED)].sum() / law.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_that_comes_late_is_learnt_by_credit_assignment_alone(seed: int):
    t = toy_trainer(delayed(seed), first_token_reward, prompts=[PROMPT], seed=seed)
    start = success(t)
    for _ in range(14):
        t.step()
    assert start < 0.35
    assert success(t) > 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("broken", ["gamma 0", "shuffled"])
def test_without_credit_assignment_it_is_not_learnt(broken: str, seed: int):
    t = toy_trainer(delayed(seed, 0.0 if broken == "gamma 0" else 1.0), first_token_reward, prompts=[PROMPT], seed=seed)
    if broken == "shuffled":
        t.__class__ = Shuffled
    for _ in range(14):
        t.step()
    assert success(t) < 0.7


# The value function: of a policy that does not change, the expected return is known at every token.


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_the_value_function_reaches_the_known_values(seed: int):
    prompts = [[3], [4, 5], [6, 7, 8]]

    def reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
        return GAINS[samples.sequences.responses[:, 0]]

    config = toy_config(
        rollout_size=96, model={"critic": "separate"}, sampling={"max_new_tokens": 2, "min_new_tokens": 2},
        reward={"kl_in": "none"}, advantages={"gamma": 1.0, "lam": 1.0},
        # The policy waits; a clipped value could only creep.
        loss={"value_clip_range": 100.0, "value_coef": 1.0},
        update={"critic_warmup": 1000, "critic_learning_rate": 1e-2, "epochs": 4, "minibatches": 2, "micro_batch": 48,
                "max_grad_norm": 100.0, "critic_schedule": "linear", "schedule_iterations": 36},
    )  # fmt: skip
    t = toy_trainer(config, reward, prompts=prompts, seed=seed)
    start = t.step()["explained_variance"]
    for _ in range(27):
        stats = t.step()
    rollout = t.roll_out()
    plain, means, variances = toy_model(), [], []
    for prompt in prompts:
        law = law_after(plain, prompt)
        law[[EOS, STOP]] = 0
        law = law / law.sum()
        means.append((law * GAINS).sum())
        variances.append((law * GAINS**2).sum() - means[-1] ** 2)
    which = torch.tensor([prompts.index(prompt) for prompt in t.next_prompts()])
    # Before the first token: the mean over its law. Before the second: what the first has decided.
    expected = torch.stack([torch.stack(means)[which], GAINS[rollout.sequences.responses[:, 0]]], dim=1)
    error = (rollout.values - expected).abs().mean()
    # Each of the two positions has the returns' variance; at the second none of it is unforeseen.
    total = torch.stack(variances).mean() + torch.stack(means).var(correction=0)
    most = float(1 - torch.stack(variances).mean() / 2 / total)
    assert start < most - 0.4
    assert stats["explained_variance"] == pytest.approx(most, abs=0.2)
    assert error < 0.15 < expected.std()
