"""Phase 1 of a cycle: the policy answers, and everything about the answers that the update needs is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ppo_core.config import SamplingConfig
from ppo_core.decoder import depth_of
from ppo_core.models import ActorCritic
from ppo_core.sampling import sample
from ppo_core.scorers import RewardModel
from ppo_core.types import Rollout, Samples, Sequences


class RewardFunction(Protocol):
    """Scores [B] of whole responses, given the trunk's activations of them."""

    def __call__(self, samples: Samples, activations: Tensor) -> Tensor: ...


class ModelReward:
    """The reward model's normalised score, read at the last token of the text (EOS is no text)."""

    def __init__(self, model: RewardModel, policy: ActorCritic) -> None:
        self.model = model
        self.shares_trunk = policy.trunk is not None and depth_of(policy.trunk) == depth_of(model.trunk)

    @torch.no_grad()
    def __call__(self, samples: Samples, activations: Tensor) -> Tensor:
        attention = text_attention(samples)
        if not self.shares_trunk:
            activations = self.model.trunk(samples.sequences.tokens, attention)
        return self.model.head.normalise(self.model.read(activations, attention))


def text_attention(samples: Samples) -> Tensor:
    """Where text stands [B, T]: the attention without the final EOS of responses that ended."""
    sequences = samples.sequences
    last = (sequences.mask.sum(dim=1) - 1).clamp(min=0) + sequences.prompt_length
    attention = sequences.attention.clone()
    rows = samples.ended.nonzero().squeeze(1)
    attention[rows, last[rows]] = False
    return attention


def collect(
    model: ActorCritic,
    reward: RewardFunction,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    eos: int,
    pad: int,
    micro_batch: int,
) -> Rollout:
    """Sample one response a prompt and score it.

    The log-probabilities kept are those of the scoring pass: the same arithmetic as in the update, so that the first
    ratio is 1 whatever the precision.
    """
    samples = sample(model.sampler, model.policy_head, prompts, sampling, seeds, eos, pad)
    parts = [
        score(model, reward, samples.rows(slice(start, start + micro_batch)), sampling.temperature)
        for start in range(0, len(prompts), micro_batch)
    ]
    return concatenate(parts)


@torch.no_grad()
def score(model: ActorCritic, reward: RewardFunction, samples: Samples, temperature: float) -> Rollout:
    """All that is known of some responses: one trunk pass serves policy, reference, critic and reward model."""
    sequences = samples.sequences
    activations = model.activations(sequences)
    policy = model.evaluate(activations, sequences, temperature)
    return Rollout(
        sequences=sequences,
        activations=activations,
        logprobs=policy.logprobs,
        ref_logprobs=model.reference_logprobs(activations, sequences, temperature),
        values=policy.values,
        entropy=policy.entropy,
        scores=reward(samples, activations).float(),
        ended=samples.ended,
    )


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Micro-batches of one batch (equal P and R) as one rollout."""
    tensors = ("activations", "logprobs", "ref_logprobs", "values", "entropy", "scores", "ended")
    sequences = Sequences(
        torch.cat([p.sequences.tokens for p in parts]),
        torch.cat([p.sequences.attention for p in parts]),
        parts[0].sequences.prompt_length,
    )
    return Rollout(sequences, **{name: torch.cat([getattr(p, name) for p in parts]) for name in tensors})
