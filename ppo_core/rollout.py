"""Phase 1 of a cycle, after the answers: everything about them that the update needs is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ppo_core.decoder import same_weights
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.scorers import RewardModel
from ppo_core.types import Rollout, Samples

PlainReward = Callable[[list[str], list[str]], Sequence[float]]
"""A plain function of prompts and responses, as texts, that returns a score for each."""


class RewardFunction(Protocol):
    """Scores [B] of whole responses, given the trunk's activations of them."""

    def __call__(self, samples: Samples, activations: Tensor) -> Tensor: ...


class ModelReward:
    """The reward model's normalised score, read at the last token of the text (EOS is no text)."""

    def __init__(self, model: RewardModel, policy: ActorCritic) -> None:
        self.model = model
        self.shares_trunk = policy.trunk is not None and same_weights(policy.trunk, model.trunk)

    @torch.no_grad()
    def __call__(self, samples: Samples, activations: Tensor) -> Tensor:
        attention = text_attention(samples)
        if not self.shares_trunk:
            activations = self.model.trunk(samples.sequences.tokens, attention)
        return self.model.head.normalise(self.model.read(activations, attention))


class CombinedReward:
    """Several rewards as one: the weighted sum of their scores, or the worst of the weighted scores."""

    def __init__(self, rewards: Mapping[str, RewardFunction], weights: Mapping[str, float], worst: bool) -> None:
        """`weights` are positive and have the names of `rewards`."""
        self.rewards, self.weights, self.worst = rewards, weights, worst

    def __call__(self, samples: Samples, activations: Tensor) -> Tensor:
        return self.combine(self.parts(samples, activations))

    def parts(self, samples: Samples, activations: Tensor) -> dict[str, Tensor]:
        """Scores [B] by name, before they are weighted."""
        return {name: _scores(reward, samples, activations) for name, reward in self.rewards.items()}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One score [B] from the scores by name."""
        weighted = torch.stack([self.weights[name] * scores for name, scores in parts.items()])
        return weighted.amin(dim=0) if self.worst else weighted.sum(dim=0)


class LengthReward:
    """How far a response is from `target` tokens: minus the distance, in units of `std` from `mean`."""

    def __init__(self, target: int, mean: float, std: float) -> None:
        self.target, self.mean, self.std = target, mean, std

    def __call__(self, samples: Samples, activations: Tensor) -> Tensor:
        return (-(samples.text_lengths - self.target).abs() - self.mean) / self.std


class FunctionReward:
    """A plain Python function of prompts and responses, read as texts."""

    def __init__(
        self,
        function: PlainReward,
        read_prompt: Callable[[list[int]], str],
        read_response: Callable[[list[int]], str],
    ) -> None:
        """`read_prompt` and `read_response` turn token ids into the texts that `function` is given."""
        self.function, self.read_prompt, self.read_response = function, read_prompt, read_response

    def __call__(self, samples: Samples, activations: Tensor) -> Tensor:
        sequences = samples.sequences
        rows = zip(sequences.tokens.cpu(), text_attention(samples).cpu(), strict=True)
        p = sequences.prompt_length
        texts = [(tokens[:p][there[:p]].tolist(), tokens[p:][there[p:]].tolist()) for tokens, there in rows]
        prompts = [self.read_prompt(prompt) for prompt, _ in texts]
        scores = self.function(prompts, [self.read_response(response) for _, response in texts])
        if len(scores) != len(texts):
            raise ValueError(f"the reward function returned {len(scores)} scores for {len(texts)} responses")
        return torch.tensor([float(score) for score in scores])


def text_attention(samples: Samples) -> Tensor:
    """Where text stands [B, T]: the attention without a final EOS or stop token."""
    sequences = samples.sequences
    places = torch.arange(sequences.responses.shape[1], device=sequences.tokens.device)
    text = places < samples.text_lengths.unsqueeze(1)
    return torch.cat([sequences.attention[:, : sequences.prompt_length], text], dim=1)


def _scores(reward: RewardFunction, samples: Samples, activations: Tensor) -> Tensor:
    """Scores [B] beside what they are scores of: functions of texts know no device."""
    return reward(samples, activations).to(samples.sequences.tokens.device, torch.float32)


def score_all(
    model: ActorCritic, reward: RewardFunction, samples: Samples, law: SamplingLaw, micro_batch: int
) -> Rollout:
    """Score samples in micro-batches of like length, without the padding that none of their rows needs.

    The log-probabilities kept are those of this pass and not the sampler's: it is the arithmetic of the update, so that
    the first ratio is 1 whatever the precision.
    """
    order = samples.sequences.attention.sum(dim=1).argsort(stable=True)
    parts = [score(model, reward, samples.rows(index), law) for index in order.split(micro_batch)]
    return Rollout.put_together(samples.sequences, parts, order)


@torch.no_grad()
def score(model: ActorCritic, reward: RewardFunction, samples: Samples, law: SamplingLaw) -> Rollout:
    """All that is known of some responses: one trunk pass serves policy, reference, critic and reward model.

    That pass is the sampler's own, where it kept what the trunk said.
    """
    sequences = samples.sequences
    activations = model.activations(sequences) if samples.activations is None else samples.activations
    policy = model.evaluate(activations, sequences, law)
    parts = reward.parts(samples, activations) if isinstance(reward, CombinedReward) else {}
    scores = reward.combine(parts) if isinstance(reward, CombinedReward) else _scores(reward, samples, activations)
    return Rollout(
        sequences=sequences,
        activations=activations,
        logprobs=policy.logprobs,
        ref_logprobs=model.reference_logprobs(activations, sequences, law),
        values=policy.values,
        entropy=policy.entropy,
        scores=scores,
        ended=samples.ended,
        parts=parts,
    )
