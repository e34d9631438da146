"""Phase 2 of a cycle: several epochs of clipped steps on one rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppo_core.config import PPOConfig
from ppo_core.diagnostics import add_up, mean_of
from ppo_core.errors import TrainingHealthError
from ppo_core.features import above
from ppo_core.health import named_responses
from ppo_core.law import SamplingLaw
from ppo_core.logprobs import logprobs_and_entropy, token_logprobs
from ppo_core.losses import denominators, kl_loss, mean_loss, policy_loss, ppo_objective, value_loss
from ppo_core.models import ActorCritic
from ppo_core.precision import MasterWeights
from ppo_core.schedules import learning_rate_factor
from ppo_core.scorers import pad_right
from ppo_core.seeds import generator
from ppo_core.types import Experience, ResponseTokens, Sequences


@dataclass(frozen=True)
class _Tokens:
    """The response tokens of a backward pass and what the rollout knows of each, [N]."""

    tokens: ResponseTokens
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    denominator: Tensor
    """Of the losses, so that what micro-batches add makes the minibatch's mean."""

    @classmethod
    def of(cls, experience: Experience, denominator: Tensor) -> _Tokens:
        """`denominator` is a scalar, or [B, 1]."""
        old, mask = experience.rollout, experience.rollout.mask
        known = (old.logprobs, old.ref_logprobs, old.values, experience.advantages, experience.returns)
        return cls(old.sequences.counted, *(x[mask] for x in (*known, denominator.expand_as(mask))))

    def part(self, rows: slice) -> _Tokens:
        numbers = (getattr(self, f.name)[rows] for f in fields(self)[1:])
        return _Tokens(self.tokens.part(rows), *numbers)

    def __len__(self) -> int:
        return len(self.tokens)


_Loss = tuple[Tensor, dict[str, Tensor]]


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
        # A critic of its own has its pass after the policy's is over, so that the activations of one lie in memory.
        self._passes = [(model.policy_features, [self._policy_loss])]
        if model.critic is None:
            self._passes[0][1].append(self._value_loss)
        else:
            self._passes.append((model.critic_features, [self._value_loss]))
        policy, critic = list(model.policy_weights().values()), model.critic_weights()
        self.weights = MasterWeights([*policy, *critic])
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
            for k, index in enumerate(order.to(self.model.device).split(size)):
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
        denominator, tokens = denominators(mask, self.config.loss.aggregation), int(mask.sum().clamp(min=1))
        found: list[tuple[str, dict[str, Tensor]]] = []
        # Responses of like length share a micro-batch, so that little is padded.
        for rows in attention.sum(dim=1).argsort(stable=True).split(self.config.update.micro_batch):
            part = experience.rows(index[rows])
            known = _Tokens.of(part, denominator[rows] if denominator.dim() else denominator)
            old, named = part.rollout, f"{where}, {named_responses(index[rows])}"
            for features_of, losses in self._passes:
                frozen = critic_only and features_of == self.model.policy_features
                with self.model.training_pass(), torch.set_grad_enabled(not frozen):
                    features = features_of(old.activations, old.sequences)
                for hidden, chunk in above(features):
                    for loss_of in losses:
                        loss, figures = loss_of(hidden, known.part(chunk), kl_coef, tokens)
                        loss.backward()
                        found.append((named, {name: x.detach() for name, x in ({"loss": loss} | figures).items()}))
        if critic_only:  # while the critic warms up, its loss must not move what it shares with the policy
            for master in self._of_policy:
                master.grad = None
        return _summed(found)

    def _policy_loss(self, hidden: Tensor, old: _Tokens, kl_coef: float, tokens: int) -> _Loss:
        """What some tokens add to the policy's part of their minibatch's loss and to its figures.

        The minibatch has `tokens` of them; `hidden` [N, D] predict these.
        """
        loss, reward, everywhere = self.config.loss, self.config.reward, torch.ones_like(old.values, dtype=torch.bool)
        logits = self.law.restricted(self.model.policy_head(hidden), old.tokens)
        logprobs, entropies = logprobs_and_entropy(logits, old.tokens.ids, self.law.temperature)
        policy = policy_loss(
            logprobs, old.logprobs, old.advantages, everywhere, loss.clip_range, loss.dual_clip, old.denominator
        )
        entropy, share = mean_loss(entropies, everywhere, old.denominator), len(old) / tokens
        total = ppo_objective(policy.loss, torch.zeros_like(policy.loss), entropy, loss.value_coef, loss.entropy_coef)
        figures = {
            "policy_loss": policy.loss,
            "clip_fraction": policy.clip_fraction * share,
            "approx_kl": policy.approx_kl * share,
            "ratio": policy.ratio * share,
            "ratio_max": policy.ratio_max,
        }
        if reward.kl_in == "loss":
            figures["kl_loss"] = kl_loss(logprobs, old.ref_logprobs, everywhere, reward.kl_estimator, old.denominator)
            total = total + kl_coef * figures["kl_loss"]
        return total, figures

    def _value_loss(self, hidden: Tensor, old: _Tokens, kl_coef: float, tokens: int) -> _Loss:
        """The critic's part likewise."""
        loss, everywhere = self.config.loss, torch.ones_like(old.values, dtype=torch.bool)
        value = value_loss(
            self.model.value_head(hidden), old.values, old.returns, everywhere, loss.value_clip_range, old.denominator
        )
        figures = {"value_loss": value.loss, "value_clip_fraction": value.clip_fraction * len(old) / tokens}
        none = torch.zeros_like(value.loss)
        total = ppo_objective(none, value.loss, none, loss.value_coef, loss.entropy_coef)
        return total, figures

    def _gather_ptx(self, draw: torch.Generator, where: str) -> float:
        """Add the gradient of c_ptx times the negative log-likelihood of some human-written texts; returns the latter.

        The mean is over tokens (Ouyang et al. 2022, equation 2).
        """
        chosen = torch.randint(len(self.ptx), (self.config.loss.ptx_batch,), generator=draw).tolist()
        # The first token is what the others are predicted from.
        texts = Sequences(*pad_right([self.ptx[i] for i in chosen], self.pad, self.model.device), prompt_length=1)
        tokens, loss = texts.mask.sum(), 0.0
        for rows in torch.arange(len(texts), device=self.model.device).split(self.config.update.micro_batch):
            part = texts.rows(rows)
            written, which = part.counted, f"{where}, human texts {[chosen[i] for i in rows.tolist()]}"
            with self.model.training_pass():
                features = self.model.policy_features(self.model.activations(part), part)
            for hidden, chunk in above(features):
                logits = self.model.policy_head(hidden)  # temperature 1, nothing left out
                nll = -token_logprobs(logits, written.ids[chunk]).sum() / tokens
                (self.config.loss.ptx_coef * nll).backward()
                value = float(nll.detach())
                _refuse_non_finite("language-modelling loss", value, which)
                loss += value
        return loss

    def _clip(self, where: str, index: Tensor) -> dict[str, float]:
        """Scale the gradient down to the largest norm allowed; raise TrainingHealthError if it has none."""
        norms = [
            # Where none has a gradient (the critic warms up), torch's 0 is on the CPU.
            get_total_norm([m.grad for m in masters if m.grad is not None]).to(self.model.device)
            for masters in (self._of_policy, self._of_critic)
        ]
        total = torch.stack(norms).norm()
        if not total.isfinite():
            raise TrainingHealthError(
                f"the gradient's norm is {float(total)}", f"{where}, {named_responses(index)}", _SLOWER
            )
        clip_grads_with_norm_(self.weights.masters, self.config.update.max_grad_norm, total)
        return _read({"grad_norm": total, "policy_grad_norm": norms[0], "critic_grad_norm": norms[1]})


def _summed(found: list[tuple[str, dict[str, Tensor]]]) -> dict[str, float]:
    """Over all backward passes of a minibatch: read when all are under way, as a GPU is waited for each time."""
    stats: dict[str, float] = {}
    for where, figures in found:
        numbers = _read(figures)
        _refuse_non_finite("loss", numbers.pop("loss"), where)
        add_up(stats, numbers)
    return stats


def _read(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """As numbers, for all of which a GPU is waited for at once."""
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))


def _refuse_non_finite(name: str, loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise TrainingHealthError(f"the {name} is {loss}", where, _SLOWER)


_SLOWER = "lower ppo.update.learning_rate"
