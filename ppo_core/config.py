"""The knobs of the algorithm, each with its default, bounds and meaning. Imports no torch, so that a UI can."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of parameters: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    trainable: Literal["top_layers", "full"] = "top_layers"
    """What PPO trains: the top layers over a frozen trunk that policy, reference, critic and reward model share,
    or all weights."""
    top_layers: Count = 6
    """How many layers `top_layers` trains, counted from the top."""
    critic: Literal["shared", "separate"] = "shared"
    """A value head on the policy's own features, or layers of the critic's own."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of forward and backward passes. Trained weights keep float32 masters either way."""


class SamplingConfig(Section):
    max_new_tokens: Count = 24
    """Longest response, in tokens; the cut counts as its end."""
    temperature: Positive = 1.0
    """Divides the logits when sampling, and in every log-probability afterwards."""


class RewardConfig(Section):
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Beta: the weight of the per-token KL penalty towards the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL from one sample (Schulman, 'Approximating KL divergence', 2020)."""
    kl_target: Positive | None = None
    """Sequence KL (nats) that an adaptive coefficient steers to (Ziegler et al. 2019, section 2.2). Empty: fixed."""
    kl_horizon: Count = 10000
    """Responses over which the adaptive coefficient may change by a factor of 1.22 (e to the 0.2) at most."""
    score_clip: Positive | None = 5.0
    """Scores, in standard deviations of human text, are clipped to this range."""


class AdvantageConfig(Section):
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of GAE (Schulman et al. 2016, equation 16)."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the whole rollout."""


class LossConfig(Section):
    clip_range: Positive = 0.2
    """Epsilon of the clipped policy loss (Schulman et al. 2017, equation 7)."""
    value_clip_range: Positive = 0.2
    """How far a value may move from the old one before its loss is clipped."""
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    """c1: weight of the value loss."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.001
    """c2: weight of the entropy bonus."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss where the advantage is negative (Ye et al. 2020, equation 5). Empty: off."""


class UpdateConfig(Section):
    learning_rate: Positive = 2.5e-4
    """Of the policy (and of a shared critic)."""
    critic_learning_rate: Positive = 2.5e-4
    """Of the value head, and of a separate critic's layers."""
    epochs: Count = 2
    """Passes over a rollout."""
    minibatches: Count = 2
    """Optimiser steps an epoch; must divide the rollout."""
    micro_batch: Count = 16
    """Responses in one backward pass; changes memory, not the gradient."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""


class PPOConfig(Section):
    """One PPO run: how large a rollout, and the parts of the algorithm."""

    iterations: Count = 4
    """Iterations of (rollout, update) in a cycle."""
    rollout_size: Count = 64
    """Responses sampled in an iteration."""
    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    update: UpdateConfig = UpdateConfig()

    @model_validator(mode="after")
    def _possible(self) -> PPOConfig:
        if self.rollout_size % self.update.minibatches:
            raise ValueError(
                f"rollout_size {self.rollout_size} does not divide into {self.update.minibatches} minibatches; "
                "choose a divisor for ppo.update.minibatches"
            )
        reward = self.reward
        if reward.kl_target and not (reward.kl_coef > 0 and reward.kl_horizon > 0.2 * self.rollout_size):
            raise ValueError(
                "an adaptive KL coefficient needs ppo.reward.kl_coef above 0, to have something to multiply, and "
                "ppo.reward.kl_horizon above a fifth of ppo.rollout_size, or one step could turn it negative"
            )
        return self
