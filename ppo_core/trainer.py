"""PPO for language models, one iteration at a time (Schulman et al. 2017, algorithm 1; Ziegler et al. 2019)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_core.advantages import gae
from ppo_core.config import PPOConfig
from ppo_core.diagnostics import describe
from ppo_core.health import Health
from ppo_core.kl import AdaptiveKL, FixedKL
from ppo_core.masking import masked_whiten
from ppo_core.models import ActorCritic
from ppo_core.rewards import shape_rewards
from ppo_core.rollout import RewardFunction, collect
from ppo_core.seeds import derive, generator
from ppo_core.types import Rollout
from ppo_core.update import Experience, Optimiser


class Trainer:
    """Owns everything that changes during training: weights, optimiser, KL coefficient, and one counter."""

    def __init__(
        self,
        model: ActorCritic,
        reward: RewardFunction,
        prompts: Sequence[list[int]],
        config: PPOConfig,
        *,
        seed: int,
        eos: int,
        pad: int,
    ) -> None:
        """`prompts` are token ids; every epoch over them is in a new order."""
        self.model, self.reward, self.prompts, self.config = model, reward, prompts, config
        self.seed, self.eos, self.pad = seed, eos, pad
        self.optimiser = Optimiser(model, config)
        kl = config.reward
        self.kl = FixedKL(kl.kl_coef) if kl.kl_target is None else AdaptiveKL(kl.kl_coef, kl.kl_target, kl.kl_horizon)
        self.health = Health()
        self.iteration = 0

    def step(self) -> dict[str, float]:
        """One iteration: roll out, estimate advantages, update. Returns diagnostics over all its tokens."""
        started = time.perf_counter()
        rollout = self.roll_out()
        sampled = time.perf_counter()
        experience = self.estimate(rollout)
        stats = describe(experience, self.kl.coef)
        self.health.check(stats, self.config.rollout_size, f"iteration {self.iteration}")
        stats |= self.optimiser.update(experience, self.seed, self.iteration)
        self.kl.update(stats["kl"], len(rollout.scores))
        self.iteration += 1
        return stats | {"rollout_s": sampled - started, "update_s": time.perf_counter() - sampled}

    def roll_out(self) -> Rollout:
        """Phase 1: the policy answers, the reward model scores, the value function predicts."""
        return collect(
            self.model,
            self.reward,
            self.next_prompts(),
            self.config.sampling,
            [derive(self.seed, "sample", self.iteration, row) for row in range(self.config.rollout_size)],
            eos=self.eos,
            pad=self.pad,
            micro_batch=self.config.update.micro_batch,
        )

    def estimate(self, rollout: Rollout) -> Experience:
        """Per-token rewards and their generalised advantages; whitening leaves the returns alone."""
        reward, advantage = self.config.reward, self.config.advantages
        rewards = shape_rewards(
            rollout.scores,
            rollout.logprobs,
            rollout.ref_logprobs,
            rollout.mask,
            self.kl.coef,
            reward.kl_estimator,
            reward.score_clip,
        )
        advantages, returns = gae(rewards, rollout.values, rollout.mask, advantage.gamma, advantage.lam)
        if advantage.whiten:
            advantages = masked_whiten(advantages, rollout.mask)
        return Experience(rollout, advantages, returns)

    def next_prompts(self) -> list[list[int]]:
        """The prompts of this iteration: a window that slides over one permutation after another."""
        size, n = self.config.rollout_size, len(self.prompts)
        first = self.iteration * size
        epochs = range(first // n, (first + size - 1) // n + 1)
        order = torch.cat([torch.randperm(n, generator=generator(self.seed, "prompts", epoch)) for epoch in epochs])
        start = first - epochs[0] * n
        return [self.prompts[i] for i in order[start : start + size].tolist()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a later process needs to go on: tensors, and plain values for JSON."""
        tensors = {f"master.{i}": t for i, t in enumerate(self.optimiser.weights.state())}
        for i, slots in self.optimiser.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": t for name, t in slots.items()}
        return tensors, {"iteration": self.iteration, "kl": self.kl.state_dict(), "health": self.health.last}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The inverse of `state`."""
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
        self.health.last = plain["health"]
