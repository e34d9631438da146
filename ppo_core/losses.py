"""The losses of PPO and of preference learning.

Shapes: [B, R] (batch, response position), or [N], tokens of any rows. Masks as in `masking`. Every loss is a sum over
counted tokens divided by `denominator`: pass the minibatch's number of counted tokens, and the losses of its
micro-batches add up to its own. A denominator [B, 1] divides each response by a number of its own (`denominators`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppo_core.kl import kl_estimate
from ppo_core.masking import counted, masked_mean

_LARGE = 80.0
"""A log-ratio far beyond every clip whose ratio is still finite in float32."""


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest are detached means over the tokens that count."""

    loss: Tensor
    clip_fraction: Tensor
    """Tokens where the clipped branch is the larger loss."""
    approx_kl: Tensor
    """KL(old || new), k3."""
    ratio: Tensor
    ratio_max: Tensor
    """The largest ratio of a token that counts; 0 where none does."""


@dataclass(frozen=True)
class ValueLoss:
    """`loss` carries the gradient; `clip_fraction` as in `PolicyLoss`."""

    loss: Tensor
    clip_fraction: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    dual_clip: float | None = None,
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """Clipped surrogate, max(-A r, -A clip(r, 1 - eps, 1 + eps)) with r = exp(logprobs - old_logprobs).

    Schulman et al. 2017, equation 7 (https://arxiv.org/abs/1707.06347), as a loss. `dual_clip` c > 1 bounds it by -A
    c where A < 0 (Ye et al. 2020, equation 5, https://arxiv.org/abs/1912.09729). All inputs [B, R].
    """
    log_ratio = counted(logprobs - old_logprobs.detach(), mask)
    advantages = counted(advantages.detach(), mask)
    # A ratio that a clip bounds, or that no advantage weighs, must not overflow: 0 x inf is NaN, backwards, too.
    bounded = advantages >= 0 if dual_clip is None else torch.ones_like(mask)
    ratio = torch.where(bounded, log_ratio.clamp(max=_LARGE), log_ratio).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(loss.dtype), mask)
        approx_kl = masked_mean(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask)
        true_ratio = counted(log_ratio.exp(), mask)
        mean_ratio = masked_mean(true_ratio, mask)
        largest = true_ratio.max() if true_ratio.numel() else torch.zeros_like(mean_ratio)
    return PolicyLoss(mean_loss(loss, mask, denominator), clip_fraction, approx_kl, mean_ratio, largest)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: Tensor | float | None = None,
) -> ValueLoss:
    """Half the squared error, the larger of the value's own and that of the value clipped to old +- clip_range.

    All inputs [B, R]. The clipping follows the reference implementation of PPO (openai/baselines, ppo2).
    """
    values, old_values, returns = (counted(x, mask) for x in (values, old_values.detach(), returns.detach()))
    # Not old + clamp(value - old): its rounding would count as clipping.
    near = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(plain.dtype), mask)
    return ValueLoss(mean_loss(0.5 * torch.maximum(plain, clipped), mask, denominator), clip_fraction)


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Bradley-Terry cross-entropy, the mean of -(t log s(x) + (1 - t) log s(-x)), s the logistic function.

    x = chosen - rejected - margin, all [B]. `target` t is the probability that people prefer the chosen one (1 if not
    given). Christiano et al. 2017, equation 1 (https://arxiv.org/abs/1706.03741); the margin as in Touvron et al.
    2023, equation 2 (https://arxiv.org/abs/2307.09288).
    """
    x = chosen_scores - rejected_scores
    if margin is not None:
        x = x - margin
    if target is None:
        return -logsigmoid(x).mean()
    return -(target * logsigmoid(x) + (1 - target) * logsigmoid(-x)).mean()


def ppo_objective(policy: Tensor, value: Tensor, entropy: Tensor, value_coef: float, entropy_coef: float) -> Tensor:
    """L = L_policy + c1 L_value - c2 H, to be minimised (Schulman et al. 2017, equation 9, negated)."""
    return policy + value_coef * value - entropy_coef * entropy


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    estimator: str = "k1",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """KL(policy || reference) per token as a term of the loss: the estimator's value, and the gradient of the KL.

    Differentiated as they stand, only k2 gives the KL's gradient: that of k1 is 0 in expectation, that of k3 belongs to
    another divergence (Tang & Munos 2025, https://arxiv.org/abs/2506.09477). So k2 carries it for each of them.
    """
    logprobs, ref_logprobs = counted(logprobs, mask), counted(ref_logprobs.detach(), mask)
    k2 = kl_estimate(logprobs, ref_logprobs, "k2")
    value = kl_estimate(logprobs, ref_logprobs, estimator)
    return mean_loss(k2 + (value - k2).detach(), mask, denominator)


def denominators(mask: Tensor, aggregation: str) -> Tensor:
    """What the losses of a minibatch with `mask` [B, R] are divided by.

    "tokens": the number of counted tokens, a scalar; every token weighs the same. "sequences": B times the response's
    own number, [B, 1]; every response weighs the same, however long.
    """
    if aggregation == "tokens":
        return mask.sum().clamp(min=1)
    if aggregation == "sequences":
        return mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask)
    raise ValueError(f"unknown aggregation {aggregation!r}; choose tokens or sequences")


def mean_loss(loss: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum of `loss` [B, R] over the tokens that count, each divided by the denominator (default: their number)."""
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    return (counted(loss, mask) / denominator).sum()
