"""The knobs of the algorithm, each with its default, bounds and meaning. Imports no torch, so that a UI can.

docs/algorithm.md gives the equation and the source behind each.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A section of parameters: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Schedule = Literal["constant", "linear", "cosine"]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2022), by peft."""

    rank: Count = 16
    """Rank of each update."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is every one but the output layer."""


class ModelConfig(Section):
    trainable: Literal["top_layers", "lora", "full"] = "top_layers"
    """What PPO trains: the top layers over a frozen trunk that policy, reference, critic and reward model share;
    low-rank adapters, the reference being the model without them; or all weights, the reference being a copy."""
    top_layers: Count = 6
    """How many layers `top_layers` trains, counted from the top."""
    lora: LoraConfig = LoraConfig()
    """The adapters of `lora`."""
    critic: Literal["shared", "separate"] = "shared"
    """A value head on the policy's own features, or weights of the critic's own, of the same kind as the policy's."""
    critic_start: Literal["reward_model", "policy"] = "reward_model"
    """What a separate critic starts as: the reward model, read-out included (it must have as many own layers as
    `top_layers`), or the policy with a value head of zeros."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of forward and backward passes; `auto` is bfloat16 where the processor has instructions for it, else
    float32. Trained weights keep float32 masters either way. (`precision.arithmetic` gives what to load a model in.)"""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""


class SamplingConfig(Section):
    max_new_tokens: Count = 24
    """Longest response, in tokens; the cut counts as its end."""
    min_new_tokens: Natural = 0
    """Before this many tokens the response cannot end: EOS and stop tokens have no probability there, and stop strings
    no effect."""
    temperature: Positive = 1.0
    """Divides the logits when sampling, and in every log-probability afterwards."""
    top_k: Count | None = None
    """Sample among so many likeliest tokens. The set is recorded, and every log-probability is relative to it."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens that together have this probability (Holtzman et al. 2020). Recorded, too."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response as EOS does, by their text."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response once it contains one; they stay in it."""

    @model_validator(mode="after")
    def _possible(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if "" in (*self.stop_strings, *self.stop_tokens):
            raise ValueError("an empty stop string or stop token would end every response; remove it")
        return self


class RewardConfig(Section):
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL penalty acts: in the per-token reward (Ziegler et al. 2019), as a term of the loss, or nowhere."""
    kl_coef: NotNegative = 0.05
    """Beta: the weight of the KL penalty towards the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL from one sample (Schulman, 'Approximating KL divergence', 2020). With `kl_in: loss` it gives
    the value that is recorded (`kl_loss`); the gradient is that of the KL for each of them."""
    kl_target: Positive | None = None
    """Sequence KL (nats) that an adaptive coefficient steers to (Ziegler et al. 2019, section 2.2). Empty: fixed."""
    kl_horizon: Count = 10000
    """Responses over which the adaptive coefficient may change by a factor of 1.22 (e to the 0.2) at most."""
    normalise: bool = False
    """Scores to mean 0 and standard deviation 1 of all scores seen so far, before penalties and the clip."""
    missing_eos_penalty: NotNegative = 0.0
    """Taken off the score of a response that was cut instead of ending."""
    length_penalty: NotNegative = 0.0
    """Taken off the score for each token."""
    overlong_buffer: Natural = 0
    """Over the last so many tokens before the cut, a penalty grows from 0 to 1 (Yu et al. 2025, equation 13). 0: no
    penalty."""
    score_clip: Positive | None = 5.0
    """Scores, in standard deviations of human text, are clipped to this range, after penalties and normalisation."""
    whiten: bool = False
    """Per-token rewards to variance 1 over the rollout; their mean stays."""

    @model_validator(mode="after")
    def _a_penalty_by_decision(self) -> RewardConfig:
        if self.kl_in == "none" and self.kl_target is not None:
            raise ValueError("kl_target steers a penalty that kl_in: none switches off; remove one of them")
        if self.kl_in != "none" and self.kl_coef == 0:
            raise ValueError(
                "kl_coef 0 is no penalty, and an adaptive KL coefficient would have nothing to multiply; "
                "to train without one, say so with kl_in: none"
            )
        return self


class AdvantageConfig(Section):
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of GAE (Schulman et al. 2016, equation 16)."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the whole rollout; returns keep their scale."""


class LossConfig(Section):
    clip_range: Positive = 0.2
    """Epsilon of the clipped policy loss (Schulman et al. 2017, equation 7)."""
    value_clip_range: Positive = 0.2
    """How far a value may move from the old one before its loss is clipped."""
    value_coef: NotNegative = 0.1
    """c1: weight of the value loss."""
    entropy_coef: NotNegative = 0.001
    """c2: weight of the entropy bonus."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss where the advantage is negative (Ye et al. 2020, equation 5). Empty: off."""
    aggregation: Literal["tokens", "sequences"] = "tokens"
    """Every token of a minibatch weighs the same, or every response does, however long."""
    ptx_coef: NotNegative = 0.0
    """Weight of a language-modelling loss on texts that people wrote (Ouyang et al. 2022, equation 2). 0: off."""
    ptx_batch: Count = 8
    """Texts of that loss in each minibatch."""


class UpdateConfig(Section):
    learning_rate: Positive = 2.5e-4
    """Of the policy (and of a shared critic)."""
    critic_learning_rate: Positive = 2.5e-4
    """Of the value head, and of a separate critic's layers."""
    schedule: Schedule = "constant"
    """Course of the policy's learning rate after the warm-up: constant, or falling to 0 over `schedule_iterations`."""
    critic_schedule: Schedule = "constant"
    """The same for the critic."""
    schedule_iterations: Count = 100
    """Horizon of falling learning rates; how long training goes on is another matter (`ppo.cycles`)."""
    warmup_iterations: Natural = 0
    """Iterations over which both learning rates rise from 0."""
    critic_warmup: Natural = 0
    """Iterations at the start in which only the critic's own weights learn."""
    epochs: Count = 2
    """Passes over a rollout."""
    minibatches: Count = 2
    """Optimiser steps an epoch; must divide the rollout."""
    micro_batch: Count = 16
    """Responses in one backward pass; changes memory, not the gradient."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    max_approx_kl: Positive | None = None
    """An update ends before the step of a minibatch whose policy is further than this from the one that sampled
    (mean over tokens of k3, nats). Empty: off."""

    @model_validator(mode="after")
    def _learns(self) -> UpdateConfig:
        falling = (self.schedule, self.critic_schedule) != ("constant", "constant")
        if falling and self.schedule_iterations <= self.warmup_iterations:
            raise ValueError(
                f"schedule_iterations {self.schedule_iterations} end within warmup_iterations "
                f"{self.warmup_iterations}: the learning rate would be 0 from then on"
            )
        return self


class HealthConfig(Section):
    """When an iteration is sick. The first time warns, `patience` times in a row end the run."""

    patience: Count = 2
    """Sick iterations in a row that end the run."""
    min_score_std: NotNegative = 1e-4
    """Constant reward: the scores of a rollout vary less than this."""
    min_entropy: NotNegative = 0.05
    """Collapsed policy: mean entropy per token under this, in nats."""
    min_length: NotNegative = 1.5
    """Collapsed length: mean response shorter than this, in tokens, its end included."""
    max_repetition: Fraction = 0.5
    """Repetition: mean share of a response's trigrams that it has said before."""
    max_sampler_gap: Positive = 0.2
    """Sampler: the log-probabilities it gave its tokens are this far from the policy's, in nats on average."""


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
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _possible(self) -> PPOConfig:
        if self.rollout_size % self.update.minibatches:
            raise ValueError(
                f"rollout_size {self.rollout_size} does not divide into {self.update.minibatches} minibatches; "
                "choose a divisor for ppo.update.minibatches"
            )
        reward, sampling = self.reward, self.sampling
        if reward.kl_target and not reward.kl_horizon > 0.2 * self.rollout_size:
            raise ValueError(
                "an adaptive KL coefficient needs ppo.reward.kl_horizon above a fifth of ppo.rollout_size, "
                "or one step could turn it negative"
            )
        if reward.overlong_buffer > sampling.max_new_tokens:
            raise ValueError(
                f"ppo.reward.overlong_buffer {reward.overlong_buffer} is longer than the longest response "
                f"(ppo.sampling.max_new_tokens {sampling.max_new_tokens})"
            )
        return self
