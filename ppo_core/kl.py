"""KL to the reference: estimators from samples, and controllers of the penalty's weight."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, from tokens that the policy sampled; any shape.

    With d = logprobs - ref_logprobs: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d
    (Schulman 2020, http://joschu.net/blog/kl-approx.html). k1 and k3 are unbiased in value. Nothing is clamped.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


class KLController(Protocol):
    """Holds the KL penalty's coefficient."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """Learn from a batch that has been used: its mean sequence KL (nats) and its number of sequences."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKL(FixedKL):
    """A coefficient steered to a target KL (Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593).

    `target` is the sequence sum in nats, `horizon` a number of sequences:
    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
