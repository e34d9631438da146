"""Policy, reference and critic, and the weights that PPO trains.

Shapes: B batch, T position, R response, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_core.config import ModelConfig
from ppo_core.decoder import Stack, clone, depth_of, join, split
from ppo_core.errors import ConfigError
from ppo_core.logprobs import logprobs_and_entropy, token_logprobs
from ppo_core.scorers import RewardModel
from ppo_core.types import Sequences


class ValueHead(nn.Module):
    """Linear read-out [.., D] -> [..] in float32. Zero at first: no reward is predicted before any was seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)


@dataclass(frozen=True)
class TokenEvaluation:
    """What the networks say of each response token, all [B, R] float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActorCritic(nn.Module):
    """Policy, frozen reference and critic of one causal LM, over one trunk where only the top is trained."""

    trunk: Stack | None

    def __init__(self, model: Any, config: ModelConfig, reward_model: RewardModel | None = None) -> None:
        """`model` becomes the reference and is never changed.

        A separate critic starts from the reward model if that stands on the same trunk, else from the policy.
        """
        super().__init__()
        self.config = config
        self.reference_model = model
        self.reference_head = model.get_output_embeddings()
        if config.trainable == "top_layers":
            self.trunk, self.reference = split(model, config.top_layers)
            self.policy, self.policy_head = clone(self.reference), self.reference_head
        else:
            policy = copy.deepcopy(model)
            self.trunk, self.reference = None, Stack(model.get_decoder())
            self.policy, self.policy_head = Stack(policy.get_decoder()), policy.get_output_embeddings()
        on_trunk = reward_model and self.trunk and depth_of(reward_model.top) == depth_of(self.reference)
        start = reward_model.top if reward_model and on_trunk else self.reference
        self.critic = clone(start) if config.critic == "separate" else None
        self._probe()
        self.value_head = ValueHead(model.config.get_text_config().hidden_size)
        self.sampler = join(self.trunk, self.policy)

    @torch.no_grad()
    def _probe(self) -> None:
        """Refuse a model whose forward is more than decoder and output layer (Gemma 2 caps logits, Granite scales)."""
        tokens = torch.arange(3, 19).unsqueeze(0) % self.reference_head.weight.shape[0]
        expected = self.reference_model(tokens).logits.float()
        attention = torch.ones_like(tokens, dtype=torch.bool)
        hidden = tokens if self.trunk is None else self.trunk(tokens, attention)
        found = self.reference_head(self.reference(hidden, attention)).float()
        if not torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0):
            raise ConfigError(
                "computes its logits in a way that is not reproduced here (scaled, capped, or mixed attention)",
                type(self.reference_model).__name__,
                "choose a model built like Llama",
            )

    def policy_weights(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters under their transformers names."""
        if self.config.trainable == "full":
            own = _prefixed(self.policy.decoder, _decoder_name(self.reference_model))
            tied = {id(p) for p in own.values()}
            head = _prefixed(self.policy_head, _name_of(self.reference_model, self.reference_head))
            return own | {name: p for name, p in head.items() if id(p) not in tied}
        prefix = _decoder_name(self.reference_model)
        cut = depth_of(self.trunk) if self.trunk else 0
        decoder: Any = self.policy.decoder
        weights = _prefixed(decoder.norm, f"{prefix}.norm")
        for i, layer in enumerate(decoder.layers):
            weights |= _prefixed(layer, f"{prefix}.layers.{cut + i}")
        return weights

    def critic_weights(self) -> list[nn.Parameter]:
        """The critic's own parameters: its layers if it has any, and the value head."""
        layers = [] if self.critic is None else list(self.critic.parameters())
        return layers + list(self.value_head.parameters())

    @torch.no_grad()
    def activations(self, sequences: Sequences) -> Tensor:
        """What every top starts from: trunk output [B, T, D], or the token ids [B, T] where there is no trunk."""
        return sequences.tokens if self.trunk is None else self.trunk(sequences.tokens, sequences.attention)

    def evaluate(self, activations: Tensor, sequences: Sequences, temperature: float) -> TokenEvaluation:
        """Log-probabilities, entropies and values of the response tokens under policy and critic."""
        hidden = _before_responses(self.policy, activations, sequences)
        logits = self.policy_head(hidden)
        of_critic = hidden if self.critic is None else _before_responses(self.critic, activations, sequences)
        logprobs, entropy = logprobs_and_entropy(logits, sequences.responses, temperature)
        return TokenEvaluation(logprobs, entropy, self.value_head(of_critic))

    @torch.no_grad()
    def reference_logprobs(self, activations: Tensor, sequences: Sequences, temperature: float) -> Tensor:
        """Log-probabilities [B, R] of the response tokens under the reference."""
        hidden = _before_responses(self.reference, activations, sequences)
        return token_logprobs(self.reference_head(hidden), sequences.responses, temperature)


def _before_responses(stack: Stack, activations: Tensor, sequences: Sequences) -> Tensor:
    """Hidden states [B, R, D] of the positions before each response token: those that predict and value it."""
    hidden: Tensor = stack(activations, sequences.attention)
    # Contiguous, because a linear layer on a slice becomes one small product a row: 28 times slower on CPU.
    return hidden[:, sequences.prompt_length - 1 : -1].contiguous()


def _prefixed(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _decoder_name(model: Any) -> str:
    return _name_of(model, model.get_decoder())
