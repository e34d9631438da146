"""Phase 2 of a cycle: what the update learns from, per token. Shapes: B batch, R response position."""

from __future__ import annotations

from torch import Tensor

from ppo_core.advantages import gae
from ppo_core.config import AdvantageConfig, PPOConfig
from ppo_core.masking import masked_whiten
from ppo_core.rewards import RunningMoments, penalise, shape_rewards
from ppo_core.types import Experience, Rollout


def token_rewards(rollout: Rollout, config: PPOConfig, kl_coef: float, moments: RunningMoments) -> Tensor:
    """Rewards [B, R]: the KL penalty of each token, and scores, normalised by `moments` and penalised if so asked."""
    reward, mask = config.reward, rollout.mask
    scores = moments.normalise(rollout.scores) if reward.normalise else rollout.scores
    scores = penalise(scores, mask.sum(dim=1), rollout.ended, reward, config.sampling.max_new_tokens)
    kl_coef = kl_coef if reward.kl_in == "reward" else 0.0
    rewards = shape_rewards(
        scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef, reward.kl_estimator, reward.score_clip
    )
    return masked_whiten(rewards, mask, shift_mean=False) if reward.whiten else rewards


def estimate(rollout: Rollout, rewards: Tensor, config: AdvantageConfig) -> Experience:
    """Generalised advantages of rewards [B, R] and the returns; whitening leaves the returns alone."""
    advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    if config.whiten:
        advantages = masked_whiten(advantages, rollout.mask)
    return Experience(rollout, advantages, returns)
