"""What a person watches: figures of one iteration, each over the tokens or responses that count."""

from __future__ import annotations

from torch import Tensor

from ppo_core.kl import kl_estimate
from ppo_core.masking import counted, masked_mean, masked_var
from ppo_core.update import Experience


def describe(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Figures of a rollout before the update: KL as sequence sums in nats, scores in the reward's own unit."""
    rollout = experience.rollout
    mask, lengths = rollout.mask, rollout.mask.sum(dim=1)

    def sequence_kl(estimator: str) -> Tensor:
        per_token = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator)
        return counted(per_token, mask).sum(dim=1).mean()

    figures = {
        "score": rollout.scores.mean(),
        "score_std": rollout.scores.std(correction=0),
        "kl": sequence_kl("k1"),
        "kl_k3": sequence_kl("k3"),
        "entropy": masked_mean(rollout.entropy, mask),
        "value": masked_mean(rollout.values, mask),
        "return": masked_mean(experience.returns, mask),
        "return_std": masked_var(experience.returns, mask).sqrt(),
        "explained_variance": explained_variance(rollout.values, experience.returns, mask),
        "length": lengths.float().mean(),
        "ended_rate": rollout.ended.float().mean(),
        "empty": ((lengths == 0) | (rollout.ended & (lengths == 1))).sum(),
    }
    return {name: float(value) for name, value in figures.items()} | {"kl_coef": kl_coef}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over the tokens that count: 1 foresees all, 0 nothing."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)
