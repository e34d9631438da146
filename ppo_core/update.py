"""Phase 2 of a cycle: several epochs of clipped steps on one rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_core.config import PPOConfig
from ppo_core.errors import TrainingHealthError
from ppo_core.losses import policy_loss, ppo_objective, value_loss
from ppo_core.masking import counted
from ppo_core.models import ActorCritic
from ppo_core.precision import MasterWeights
from ppo_core.seeds import generator
from ppo_core.types import Rollout


@dataclass(frozen=True)
class Experience:
    """A rollout with its learning targets, all [B, R]. Fixed for all epochs."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        return Experience(self.rollout.rows(index), self.advantages[index], self.returns[index])


class Optimiser:
    """AdamW over the float32 masters of policy and critic, each with its learning rate."""

    def __init__(self, model: ActorCritic, config: PPOConfig) -> None:
        self.model, self.config = model, config
        policy, critic = list(model.policy_weights().values()), model.critic_weights()
        self.weights = MasterWeights([*policy, *critic])
        for parameter in self.weights.working:
            parameter.requires_grad_(True)
        masters = self.weights.masters
        groups = [
            {"params": masters[: len(policy)], "lr": config.update.learning_rate},
            {"params": masters[len(policy) :], "lr": config.update.critic_learning_rate},
        ]
        # 1e-5 as in the reference implementations (Huang et al. 2024, detail on Adam's epsilon).
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def update(self, experience: Experience, seed: int, iteration: int) -> dict[str, float]:
        """Train on `experience`; each diagnostic is its mean over the optimiser steps, and there over the tokens."""
        update = self.config.update
        size = len(experience.rollout.scores) // update.minibatches
        totals: dict[str, float] = {}
        for epoch in range(update.epochs):
            order = torch.randperm(
                size * update.minibatches, generator=generator(seed, "minibatches", iteration, epoch)
            )
            for k, index in enumerate(order.split(size)):
                where = f"iteration {iteration}, epoch {epoch + 1}, minibatch {k + 1}"
                for name, value in self._step(experience.rows(index), where).items():
                    totals[name] = totals.get(name, 0.0) + value / (update.epochs * update.minibatches)
        return totals

    def _step(self, minibatch: Experience, where: str) -> dict[str, float]:
        """One optimiser step, its gradient gathered over micro-batches and independent of how they split it."""
        rows, size = torch.arange(len(minibatch.rollout.scores)), self.config.update.micro_batch
        denominator = minibatch.rollout.mask.sum().clamp(min=1)
        stats: dict[str, float] = {}
        for index in rows.split(size):
            micro = minibatch.rows(index)
            share = float(micro.rollout.mask.sum() / denominator)
            for name, value in self._backward(micro, denominator).items():
                stats[name] = stats.get(name, 0.0) + value * share
            self.weights.collect()
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.masters, self.config.update.max_grad_norm))
        if not torch.isfinite(torch.tensor([norm, *stats.values()])).all():
            raise TrainingHealthError(
                f"loss or gradient is not finite (norm {norm}, {stats})", where, "lower ppo.update.learning_rate"
            )
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.weights.publish()
        return stats | {"grad_norm": norm}

    def _backward(self, micro: Experience, denominator: Tensor) -> dict[str, float]:
        rollout, loss = micro.rollout, self.config.loss
        mask = rollout.mask
        now = self.model.evaluate(rollout.activations, rollout.sequences, self.config.sampling.temperature)
        policy = policy_loss(
            now.logprobs, rollout.logprobs, micro.advantages, mask, loss.clip_range, loss.dual_clip, denominator
        )
        value = value_loss(now.values, rollout.values, micro.returns, mask, loss.value_clip_range, denominator)
        entropy = counted(now.entropy, mask).sum() / denominator
        total = ppo_objective(policy.loss, value.loss, entropy, loss.value_coef, loss.entropy_coef)
        total.backward()
        tokens = mask.sum().clamp(min=1) / denominator
        return {
            "policy_loss": float(policy.loss.detach() / tokens),
            "value_loss": float(value.loss.detach() / tokens),
            "clip_fraction": float(policy.clip_fraction),
            "value_clip_fraction": float(value.clip_fraction),
            "approx_kl": float(policy.approx_kl),
            "ratio": float(policy.ratio),
        }
