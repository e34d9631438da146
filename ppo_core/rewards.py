"""From one score a response to one reward a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_core.kl import kl_estimate
from ppo_core.masking import counted


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str = "k1",
    score_clip: float | None = None,
) -> Tensor:
    """Rewards [B, R] from scores [B] and log-probabilities [B, R] of policy and reference.

    r_t = -kl_coef * kl_t, plus the score on the last token that counts: EOS, or the cut
    (Ziegler et al. 2019, equation 2, with the penalty spread over the tokens). `score_clip` bounds the score, which
    by now is normalised and penalised. A response without any token is scored at its first position.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)}, must be {tuple(mask.shape[:1])}: one a response")
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    dtype = torch.promote_types(torch.promote_types(scores.dtype, logprobs.dtype), torch.float32)
    rewards = counted(-kl_coef * kl_estimate(logprobs.to(dtype), ref_logprobs.to(dtype), estimator), mask)
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(dtype).unsqueeze(1))
