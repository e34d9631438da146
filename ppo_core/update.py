"""Phase 2 of a cycle: several epochs of clipped steps on one rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppo_core.config import PPOConfig
from ppo_core.diagnostics import add_up, mean_of
from ppo_core.errors import TrainingHealthError
from ppo_core.health import named_responses
from ppo_core.law import SamplingLaw
from ppo_core.losses import denominators, kl_loss, mean_loss, policy_loss, ppo_objective, value_loss
from ppo_core.models import ActorCritic
from ppo_core.precision import MasterWeights
from ppo_core.schedules import learning_rate_factor
from ppo_core.scorers import pad_right
from ppo_core.seeds import generator
from ppo_core.types import Experience, Sequences


@dataclass(frozen=True)
class _MicroBatch:
    """The responses of one backward pass, and what they need to know of their minibatch."""

    experience: Experience
    denominator: Tensor
    """Of the losses: a scalar, or [B, 1]."""
    tokens: Tensor
    """How many count in the whole minibatch."""
    kl_coef: float
    where: str


class Optimiser:
    """AdamW over the float32 masters of policy and critic, each with its learning rate."""

    def __init__(
        self,
        model: ActorCritic,
        config: PPOConfig,
        law: SamplingLaw,
        *,
        ptx: Sequence[Sequence[int]] = (),
        pad: int = 0,
    ) -> None:
        """`ptx` are the token ids of the texts for the language-modelling term, each at least two long."""
        self.model, self.config, self.law, self.ptx, self.pad = model, config, law, ptx, pad
        policy, critic = list(model.policy_weights().values()), model.critic_weights()
        self.weights = MasterWeights([*policy, *critic])
        for parameter in self.weights.working:
            parameter.requires_grad_(True)
        masters, update = self.weights.masters, config.update
        self._of_policy, self._of_critic = masters[: len(policy)], masters[len(policy) :]
        groups = [
            {"params": self._of_policy, "lr": update.learning_rate},
            {"params": self._of_critic, "lr": update.critic_learning_rate},
        ]
        # 1e-5 as in the reference implementations (Huang et al. 2024, detail on Adam's epsilon).
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def update(self, experience: Experience, *, seed: int, iteration: int, kl_coef: float) -> dict[str, float]:
        """Train on `experience`; each diagnostic is its mean over the optimiser steps, and there over the tokens.

        Ends before the step of a minibatch whose policy has gone further than `max_approx_kl`; `steps` counts those
        that were made. Raises TrainingHealthError before a step that is not finite.
        """
        update = self.config.update
        self._set_learning_rates(iteration)
        size, rest = divmod(len(experience.rollout), update.minibatches)
        if rest:
            raise ValueError(f"{len(experience.rollout)} responses do not divide into {update.minibatches} minibatches")
        figures: list[dict[str, float]] = []
        for epoch in range(update.epochs):
            order = torch.randperm(
                size * update.minibatches, generator=generator(seed, "minibatches", iteration, epoch)
            )
            for k, index in enumerate(order.split(size)):
                cycle = iteration // self.config.iterations + 1
                where = f"cycle {cycle}, iteration {iteration + 1}, epoch {epoch + 1}, minibatch {k + 1}"
                stats = self._gather(experience, index, kl_coef, where, iteration < update.critic_warmup)
                if self.config.loss.ptx_coef and iteration >= update.critic_warmup:
                    stats["ptx_loss"] = self._gather_ptx(generator(seed, "ptx", iteration, epoch, k), where)
                figures.append(stats | self._clip(where, index))
                if update.max_approx_kl is not None and stats["approx_kl"] > update.max_approx_kl:
                    self.adam.zero_grad(set_to_none=True)
                    return mean_of(figures) | {"steps": len(figures) - 1.0}
                self.adam.step()
                self.adam.zero_grad(set_to_none=True)
                self.weights.publish()
        return mean_of(figures) | {"steps": float(len(figures))}

    def _set_learning_rates(self, iteration: int) -> None:
        update = self.config.update
        courses = ((update.learning_rate, update.schedule), (update.critic_learning_rate, update.critic_schedule))
        for group, (rate, schedule) in zip(self.adam.param_groups, courses, strict=True):
            group["lr"] = rate * learning_rate_factor(
                schedule, iteration, warmup=update.warmup_iterations, horizon=update.schedule_iterations
            )

    def _gather(
        self, experience: Experience, index: Tensor, kl_coef: float, where: str, critic_only: bool = False
    ) -> dict[str, float]:
        """The gradient of the rows `index` in the masters, independent of how micro-batches split it; their figures."""
        attention, mask = experience.rollout.sequences.attention[index], experience.rollout.mask[index]
        denominator = denominators(mask, self.config.loss.aggregation)
        stats: dict[str, float] = {}
        # Responses of like length share a micro-batch, so that little is padded.
        for rows in attention.sum(dim=1).argsort(stable=True).split(self.config.update.micro_batch):
            micro = _MicroBatch(
                experience.rows(index[rows]),
                denominator[rows] if denominator.dim() else denominator,
                mask.sum().clamp(min=1),
                kl_coef,
                f"{where}, {named_responses(index[rows])}",
            )
            add_up(stats, self._backward(micro))
            self._collect(critic_only)
        return stats

    def _backward(self, micro: _MicroBatch) -> dict[str, float]:
        """A micro-batch's part of the gradient, and of the minibatch's figures."""
        rollout, loss, reward = micro.experience.rollout, self.config.loss, self.config.reward
        mask, denominator = rollout.mask, micro.denominator
        with self.model.training_pass():
            now = self.model.evaluate(rollout.activations, rollout.sequences, self.law)
            policy = policy_loss(
                now.logprobs,
                rollout.logprobs,
                micro.experience.advantages,
                mask,
                loss.clip_range,
                loss.dual_clip,
                denominator,
            )
            value = value_loss(
                now.values, rollout.values, micro.experience.returns, mask, loss.value_clip_range, denominator
            )
            entropy = mean_loss(now.entropy, mask, denominator)
            total = ppo_objective(policy.loss, value.loss, entropy, loss.value_coef, loss.entropy_coef)
            terms: dict[str, float] = {}
            if reward.kl_in == "loss":
                kl = kl_loss(now.logprobs, rollout.ref_logprobs, mask, reward.kl_estimator, denominator)
                total = total + micro.kl_coef * kl
                terms["kl_loss"] = float(kl.detach())
            if not total.isfinite():
                raise TrainingHealthError(f"the loss is {float(total.detach())}", micro.where, _SLOWER)
            total.backward()
        share = float(mask.sum() / micro.tokens)
        return terms | {
            "policy_loss": float(policy.loss.detach()),
            "value_loss": float(value.loss.detach()),
            "clip_fraction": float(policy.clip_fraction) * share,
            "value_clip_fraction": float(value.clip_fraction) * share,
            "approx_kl": float(policy.approx_kl) * share,
            "ratio": float(policy.ratio) * share,
            "ratio_max": float(policy.ratio_max),
        }

    def _gather_ptx(self, draw: torch.Generator, where: str) -> float:
        """Add the gradient of c_ptx times the negative log-likelihood of some human-written texts; returns the latter.

        The mean is over tokens (Ouyang et al. 2022, equation 2).
        """
        chosen = torch.randint(len(self.ptx), (self.config.loss.ptx_batch,), generator=draw).tolist()
        # The first token is what the others are predicted from.
        texts = Sequences(*pad_right([self.ptx[i] for i in chosen], self.pad), prompt_length=1)
        tokens, loss = texts.mask.sum(), 0.0
        for rows in torch.arange(len(texts)).split(self.config.update.micro_batch):
            part = texts.rows(rows)
            with self.model.training_pass():
                nll = mean_loss(-self.model.language_model_logprobs(part), part.mask, tokens)
                if not nll.isfinite():
                    which = f"{where}, human texts {[chosen[i] for i in rows.tolist()]}"
                    raise TrainingHealthError("the language-modelling loss is not finite", which, _SLOWER)
                (self.config.loss.ptx_coef * nll).backward()
            loss += float(nll.detach())
            self._collect(critic_only=False)
        return loss

    def _collect(self, critic_only: bool) -> None:
        if critic_only:  # while the critic warms up, its loss must not move what it shares with the policy
            for parameter in self.weights.working[: len(self._of_policy)]:
                parameter.grad = None
        self.weights.collect()

    def _clip(self, where: str, index: Tensor) -> dict[str, float]:
        """Scale the gradient down to the largest norm allowed; raise TrainingHealthError if it has none."""
        norms = [
            get_total_norm([m.grad for m in masters if m.grad is not None])
            for masters in (self._of_policy, self._of_critic)
        ]
        total = torch.stack(norms).norm()
        if not total.isfinite():
            raise TrainingHealthError(
                f"the gradient's norm is {float(total)}", f"{where}, {named_responses(index)}", _SLOWER
            )
        clip_grads_with_norm_(self.weights.masters, self.config.update.max_grad_norm, total)
        return {"grad_norm": float(total), "policy_grad_norm": float(norms[0]), "critic_grad_norm": float(norms[1])}


_SLOWER = "lower ppo.update.learning_rate"
