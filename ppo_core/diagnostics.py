"""What a person watches: figures over the tokens or responses that count, and how those of parts make those of a whole.

A name that ends in `_max` is a maximum, `x_std` the standard deviation beside the mean `x`, one in `SUMS` a number of
things; every other figure is a mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppo_core.kl import kl_estimate
from ppo_core.masking import counted, masked_mean, masked_var
from ppo_core.types import Experience, Rollout, Samples

SUMS = ("tokens", "empty", "steps")
OF_RESPONSES = ("score", "kl", "kl_k3", "length", "ended_rate", "repetition", "kl_coef")
"""Means over responses, or one number an iteration; the other means are over tokens."""
PART = "score/"
"""Before the name of a part of a combined reward: its mean score over responses."""


def describe(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Figures of a rollout before the update: KL as sequence sums in nats, scores in the reward's own unit."""
    rollout = experience.rollout
    mask, lengths = rollout.mask, rollout.mask.sum(dim=1)
    advantages = experience.returns - rollout.values  # before whitening

    def sequence_kl(estimator: str) -> Tensor:
        per_token = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator)
        return counted(per_token, mask).sum(dim=1).mean()

    figures = {
        "score": rollout.scores.mean(),
        "score_std": rollout.scores.std(correction=0),
        "score_max": rollout.scores.max(),
        "kl": sequence_kl("k1"),
        "kl_k3": sequence_kl("k3"),
        "entropy": masked_mean(rollout.entropy, mask),
        "value": masked_mean(rollout.values, mask),
        "value_std": masked_var(rollout.values, mask).sqrt(),
        "return": masked_mean(experience.returns, mask),
        "return_std": masked_var(experience.returns, mask).sqrt(),
        "advantage": masked_mean(advantages, mask),
        "advantage_std": masked_var(advantages, mask).sqrt(),
        "explained_variance": explained_variance(rollout.values, experience.returns, mask),
        "length": lengths.float().mean(),
        "length_std": lengths.float().std(correction=0),
        "ended_rate": rollout.ended.float().mean(),
        "repetition": repetition(rollout.sequences.responses, mask).mean(),
        "empty": ((lengths == 0) | (rollout.ended & (lengths == 1))).sum(),
        "tokens": lengths.sum(),
    }
    figures |= {PART + name: scores.mean() for name, scores in rollout.parts.items()}
    return {name: float(value) for name, value in figures.items()} | {"kl_coef": kl_coef}


def sampler_gap(samples: Samples, rollout: Rollout) -> float:
    """Mean distance, in nats, of the log-probabilities that the sampler gave its tokens from those that are trained on.

    No more than rounding, unless the sampler has other weights or another law.
    """
    return float(masked_mean((samples.logprobs - rollout.logprobs).abs(), rollout.mask))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over the tokens that count: 1 foresees all, 0 nothing."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)


def repetition(tokens: Tensor, mask: Tensor, n: int = 3) -> Tensor:
    """Share [B] of each response's n-grams that occurred in it before; 0 where there is none."""
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens), device=tokens.device)
    tokens = counted(tokens, mask)
    # An n-gram as one number: distinct numbers are distinct n-grams as long as vocabulary^n fits 63 bits.
    base = int(tokens.max()) + 1
    windows = tokens.unfold(1, n, 1)
    grams = (windows * base ** torch.arange(n - 1, -1, -1, device=tokens.device)).sum(dim=-1)
    counts = mask[:, n - 1 :]
    ordered = torch.where(counts, grams, -1).sort(dim=1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(dim=1)
    return repeated / counts.sum(dim=1).clamp(min=1)


def add_up(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add the figures of a micro-batch, already weighted, to those of its minibatch."""
    for name, value in part.items():
        total[name] = max(total.get(name, value), value) if name.endswith("_max") else total.get(name, 0.0) + value


def mean_of(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of an update from those of its optimiser steps, which weigh the same."""
    names = dict.fromkeys(name for step in steps for name in step)
    figures = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        figures[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return figures


def over_cycle(iterations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of a cycle from those of its iterations, as if all their tokens and responses had been one batch."""
    figures: dict[str, float] = {}
    for name in dict.fromkeys(name for stats in iterations for name in stats):
        present = [stats for stats in iterations if name in stats]
        values = torch.tensor([stats[name] for stats in present], dtype=torch.float64)
        if name.endswith("_max"):
            figures[name] = float(values.max())
        elif name in SUMS or name.endswith("_s"):
            figures[name] = float(values.sum())
        elif name.endswith("_std"):
            figures[name] = _pooled_std(name.removesuffix("_std"), present)
        else:
            figures[name] = float((_weights(name, present) * values).sum())
    if "explained_variance" in figures:  # a ratio of variances; an advantage is what the value did not foresee
        figures["explained_variance"] = 1 - figures["advantage_std"] ** 2 / max(figures["return_std"] ** 2, 1e-8)
    for phase in ("sample", "score", "update"):
        if seconds := figures.get(f"{phase}_s"):
            figures[f"{phase}_tokens_per_second"] = figures["tokens"] / seconds
    return figures


def _weights(name: str, iterations: Sequence[Mapping[str, float]]) -> Tensor:
    """What each iteration contributes to the mean `name`; every rollout has the same number of responses."""
    of_responses = name in OF_RESPONSES or name.startswith(PART)
    per = [1.0 if of_responses else stats["tokens"] for stats in iterations]
    weights = torch.tensor(per, dtype=torch.float64)
    return weights / weights.sum().clamp(min=1)


def _pooled_std(mean: str, iterations: Sequence[Mapping[str, float]]) -> float:
    """The standard deviation of the union from means and standard deviations of the parts."""
    weights = _weights(mean, iterations)
    means = torch.tensor([stats[mean] for stats in iterations], dtype=torch.float64)
    stds = torch.tensor([stats[f"{mean}_std"] for stats in iterations], dtype=torch.float64)
    overall = (weights * means).sum()
    return float((weights * (stds.square() + (means - overall).square())).sum().clamp(min=0).sqrt())
