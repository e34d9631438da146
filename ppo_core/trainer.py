"""PPO for language models, one iteration at a time (Schulman et al. 2017, algorithm 1; Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_core.config import PPOConfig
from ppo_core.device import clock as read_clock
from ppo_core.diagnostics import describe, sampler_gap
from ppo_core.experience import estimate, token_rewards
from ppo_core.health import Health, refuse_non_finite
from ppo_core.kl import AdaptiveKL, FixedKL, KLController
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.rewards import RunningMoments
from ppo_core.rollout import RewardFunction, score_all
from ppo_core.sampling import sample
from ppo_core.seeds import derive, generator
from ppo_core.types import Experience, Rollout, Samples
from ppo_core.update import Optimiser

Answer = Callable[[list[list[int]], Sequence[int]], Samples]
"""Prompts and the seeds of their answers to samples of the policy as it is now."""


class Trainer:
    """Owns everything that changes during training: weights, optimiser, KL coefficient, moments, and one counter."""

    def __init__(
        self,
        model: ActorCritic,
        reward: RewardFunction,
        prompts: Sequence[list[int]],
        config: PPOConfig,
        *,
        seed: int,
        law: SamplingLaw,
        pad: int,
        ptx: Sequence[Sequence[int]] = (),
    ) -> None:
        """`prompts` and `ptx` (texts for the language-modelling term) are token ids.

        Every epoch over the prompts is in a new order.
        """
        if config.loss.ptx_coef and not ptx:
            raise ValueError("ppo.loss.ptx_coef needs texts: pass ptx")
        self.model, self.reward, self.prompts, self.config = model, reward, prompts, config
        self.seed, self.law, self.pad = seed, law, pad
        self.answer: Answer = self._answer
        """What samples: the model itself, unless something else is put here."""
        self.optimiser = Optimiser(model, config, law, ptx=ptx, pad=pad)
        kl = config.reward
        self.kl: KLController = (
            FixedKL(kl.kl_coef) if kl.kl_target is None else AdaptiveKL(kl.kl_coef, kl.kl_target, kl.kl_horizon)
        )
        self.moments = RunningMoments()
        self.health = Health(config.health)
        self.iteration = 0

    def step(self) -> dict[str, float]:
        """One iteration: roll out, estimate advantages, update. Returns diagnostics over all its tokens."""
        clock = [read_clock()]
        samples = self.sample()
        clock.append(read_clock())
        rollout = self.score(samples)
        self.moments.update(rollout.scores)
        experience = self.estimate(rollout)
        stats = describe(experience, 0.0 if self.config.reward.kl_in == "none" else self.kl.coef)
        stats["sampler_gap"] = sampler_gap(samples, rollout)
        self.health.check(stats, len(rollout), self._where())
        clock.append(read_clock())
        stats |= self.optimiser.update(experience, seed=self.seed, iteration=self.iteration, kl_coef=self.kl.coef)
        if self.iteration >= self.config.update.critic_warmup:  # before, the policy had no way to move
            self.kl.update(stats["kl"], len(rollout))
        self.iteration += 1
        clock.append(read_clock())
        phases = zip(("sample_s", "score_s", "update_s"), clock, clock[1:], strict=False)
        return stats | {phase: end - start for phase, start, end in phases}

    def sample(self) -> Samples:
        """Phase 1: the policy answers."""
        seeds = [derive(self.seed, "sample", self.iteration, row) for row in range(self.config.rollout_size)]
        return self.answer(self.next_prompts(), seeds)

    def _answer(self, prompts: list[list[int]], seeds: Sequence[int]) -> Samples:
        return sample(self.model.sampler, self.model.policy_head, prompts, self.law, seeds, self.pad)

    def score(self, samples: Samples) -> Rollout:
        """The reward model scores, the reference compares, the value function predicts."""
        rollout = score_all(self.model, self.reward, samples, self.law, self.config.update.micro_batch)
        refuse_non_finite(rollout, self._where())
        return rollout

    def roll_out(self) -> Rollout:
        """Both of the above."""
        return self.score(self.sample())

    def estimate(self, rollout: Rollout) -> Experience:
        """Per-token rewards and their generalised advantages."""
        rewards = token_rewards(rollout, self.config, self.kl.coef, self.moments)
        return estimate(rollout, rewards, self.config.advantages)

    def next_prompts(self) -> list[list[int]]:
        """The prompts of this iteration: a window that slides over one permutation after another."""
        size, n = self.config.rollout_size, len(self.prompts)
        first = self.iteration * size
        epochs = range(first // n, (first + size - 1) // n + 1)
        order = torch.cat([torch.randperm(n, generator=generator(self.seed, "prompts", epoch)) for epoch in epochs])
        start = first - epochs[0] * n
        return [self.prompts[i] for i in order[start : start + size].tolist()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later process needs to go on: tensors, and plain values for JSON.

        There are no generators in it: every draw is seeded by what it is for and by the iteration (`seeds`). Learning
        rates and the place in the prompts follow from the iteration, too. The tensors are those in use: save them, or
        copy them, before the next step.
        """
        tensors = {f"master.{i}": t for i, t in enumerate(self.optimiser.weights.state())}
        for i, slots in self.optimiser.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": t for name, t in slots.items()}
        return tensors, {
            "iteration": self.iteration,
            "kl": self.kl.state_dict(),
            "moments": self.moments.state_dict(),
            "health": self.health.state_dict(),
        }

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The inverse of `state`. The optimiser goes on in these very tensors, so give it copies of what is to stay."""
        masters = self.optimiser.weights.masters
        self.optimiser.weights.load([tensors[f"master.{i}"] for i in range(len(masters))])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, index, *name = key.split(".")
            if kind == "adam":
                slots.setdefault(int(index), {})[name[0]] = tensor
        adam = self.optimiser.adam
        adam.load_state_dict({"state": slots, "param_groups": adam.state_dict()["param_groups"]})
        self.iteration = plain["iteration"]
        self.kl.load_state_dict(plain["kl"])
        self.moments.load_state_dict(plain["moments"])
        self.health.load_state_dict(plain["health"])

    def _where(self) -> str:
        return f"cycle {self.iteration // self.config.iterations + 1}, iteration {self.iteration + 1}"
