"""From one score a response to one reward a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_core.config import RewardConfig
from ppo_core.kl import kl_estimate
from ppo_core.masking import counted


def penalise(scores: Tensor, lengths: Tensor, ended: Tensor, config: RewardConfig, max_new_tokens: int) -> Tensor:
    """Scores [B] less what their responses' form costs; `lengths` [B] in tokens, `ended` [B] bool.

    Taken off are `missing_eos_penalty` where the response was cut (the EOS trick of Huang et al. 2024, as a
    subtraction), `length_penalty` for each token, and max(0, length - (L - buffer)) / buffer, the soft overlong
    punishment, with L the longest response (Yu et al. 2025, equation 13, https://arxiv.org/abs/2503.14476).
    """
    scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype) - config.length_penalty * lengths
    if config.overlong_buffer:
        over = (lengths - (max_new_tokens - config.overlong_buffer)).clamp(min=0)
        scores = scores - over / config.overlong_buffer
    return scores


class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1979: two sets of moments become one)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        """`squares`: the sum of squared deviations from the mean."""

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores [B]."""
        x = scores.double()
        n, mean = len(x), float(x.mean())
        shift, total = mean - self.mean, self.count + n
        self.squares += float((x - mean).square().sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """Scores [B] in standard deviations from the mean; 0 while all that was seen is equal."""
        std = (self.squares / max(self.count, 1)) ** 0.5
        return (scores - self.mean) / std if std > 0 else torch.zeros_like(scores)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


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
    logprobs, ref_logprobs = counted(logprobs.to(dtype), mask), counted(ref_logprobs.to(dtype), mask)
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator)
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(dtype).unsqueeze(1))
