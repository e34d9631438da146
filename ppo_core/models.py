"""Policy, reference and critic, and the weights that PPO trains.

Shapes: B batch, T position, R response, N response tokens that count, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_core.adapters import adapter_weights, add_adapter, without_adapter
from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.decoder import LMHead, Stack, clone, depth_of, join, prepared, same_weights, share, split
from ppo_core.errors import ConfigError
from ppo_core.features import in_place, law_of_tokens, logprobs_of_tokens
from ppo_core.law import SamplingLaw
from ppo_core.sampling import Sampler
from ppo_core.scorers import ReadOut, RewardModel, ScoreHead
from ppo_core.seeds import derive
from ppo_core.types import Sequences
from ppo_core.weights import SCALING, install


class ValueHead(ReadOut):
    """Predicts what is to come. Zero at first: no reward is predicted before any was seen."""

    @torch.no_grad()
    def start_from(self, head: ScoreHead) -> None:
        """Predict, before every token, the normalised score that the reward model gives to the text so far."""
        self.linear.weight.copy_(head.linear.weight / head.std)
        self.linear.bias.copy_((head.linear.bias - head.mean) / head.std)


@dataclass(frozen=True)
class TokenEvaluation:
    """What the networks say of each response token, all [B, R] float32; 0 where none counts."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActorCritic(nn.Module):
    """Policy, frozen reference and critic of one causal LM.

    | trained    | policy                          | reference                                 |
    |------------|---------------------------------|-------------------------------------------|
    | top_layers | own top over the shared trunk   | the frozen top of that trunk              |
    | lora       | the model's weights and adapter | the same weights, seen without adapter    |
    | full       | a copy                          | the model                                 |
    """

    trunk: Stack | None
    critic: Stack | None

    def __init__(
        self, model: Any, config: ModelConfig, reward_model: RewardModel | None = None, *, seed: int = 0
    ) -> None:
        """`model` becomes the reference: its dropout is switched off, a peft adapter that it carries is merged into it.

        After that it is never changed.

        `seed` is that of new adapters. Raises ConfigError if the model cannot be trained in this way, or a separate
        critic cannot start as `config.critic_start` says.
        """
        super().__init__()
        self.config = config
        self.reference_model = model = prepared(without_adapter(model)).requires_grad_(False).eval()
        self.reference_head = LMHead(model)
        self.policy_head = self.reference_head
        if config.trainable == "top_layers":
            self.trunk, self.reference = split(model, config.top_layers)
            self.policy = clone(self.reference)
        else:
            self.trunk, self.reference = None, Stack(model.get_decoder())
            if config.trainable == "lora":
                self.policy = self._adapted(self.reference, derive(seed, "adapter", "policy"))
            else:
                policy = copy.deepcopy(model)
                self.policy, self.policy_head = Stack(policy.get_decoder()), LMHead(policy)
        # Not the hidden size of the configuration: OPT-350m projects what its layers return.
        self.value_head = ValueHead(self.reference_head.linear.in_features).to(model.device)
        self.critic = self._new_critic(reward_model, seed) if config.critic == "separate" else None
        if config.gradient_checkpointing or config.trainable == "lora":  # which only transformers' own code knows
            for stack in [self.reference, *self._trained_stacks()]:
                stack.may_pack = False
        self._probe()
        self.sampler = Sampler(self.trunk, self.policy)
        if config.gradient_checkpointing:
            for stack in self._trained_stacks():
                stack.checkpoint_activations()

    @property
    def device(self) -> torch.device:
        """Where the models are, and with them all that they are given."""
        return self.reference_head.linear.weight.device

    def _adapted(self, stack: Stack, seed: int) -> Stack:
        """The stack's own weights, not copied, seen through an adapter that the stack itself knows nothing of."""
        adapted = Stack(share(stack.decoder))
        add_adapter(adapted.decoder, self.config.lora, seed)
        return adapted

    def _new_critic(self, reward_model: RewardModel | None, seed: int) -> Stack:
        """Layers for a separate critic, of the kind that is trained; gives the value head its start, too."""
        start = self.reference
        if self.config.critic_start == "reward_model":
            if reward_model is None:
                raise ConfigError("there is no trained reward model to start from", _CRITIC_START, "set it to policy")
            if self.trunk is None:
                start = Stack(join(reward_model.trunk, reward_model.top))
            elif depth_of(reward_model.top) != depth_of(self.reference):
                raise ConfigError(
                    f"the reward model has {depth_of(reward_model.top)} layers of its own, the critic "
                    f"{depth_of(self.reference)}",
                    _CRITIC_START,
                    "set it to policy, or reward_model.top_layers to ppo.model.top_layers",
                )
            elif not same_weights(reward_model.trunk, self.trunk):
                raise ConfigError(
                    "the reward model's layers read activations of another model", _CRITIC_START, "set it to policy"
                )
            else:
                start = reward_model.top
            self.value_head.start_from(reward_model.head)
        if self.config.trainable == "lora":
            return self._adapted(start, derive(seed, "adapter", "critic"))
        return clone(start)

    @torch.no_grad()
    def _probe(self) -> None:
        """Refuse a model whose forward is more than decoder and output layer as we know them."""
        tokens = torch.arange(3, 19, device=self.device).unsqueeze(0) % self.reference_head.linear.weight.shape[0]
        expected = self.reference_model(tokens).logits.float()
        attention = torch.ones_like(tokens, dtype=torch.bool)
        hidden = tokens if self.trunk is None else self.trunk.plain(tokens, attention)
        found = self.reference_head(self.reference.plain(hidden, attention)).float()
        if not torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0):
            raise ConfigError(
                "computes its logits in a way that is not reproduced here",
                type(self.reference_model).__name__,
                "set ppo.model.trainable to lora or full" if self.trunk else "choose another model",
            )

    def policy_weights(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters under their transformers (adapters: peft) names."""
        prefix = _decoder_name(self.reference_model)
        decoder: Any = self.policy.decoder
        if self.config.trainable == "lora":
            return {f"{prefix}.{name}": p for name, p in adapter_weights(decoder).items()}
        if self.config.trainable == "full":
            own = _prefixed(decoder, prefix)
            tied = {id(p) for p in own.values()}
            head = _prefixed(self.policy_head.linear, _name_of(self.reference_model, self.reference_head.linear))
            return own | {name: p for name, p in head.items() if id(p) not in tied}
        assert self.trunk is not None
        weights = {}
        for name, parameter in decoder.named_parameters():
            if name.startswith("layers."):
                _, i, rest = name.split(".", 2)
                name = f"layers.{depth_of(self.trunk) + int(i)}.{rest}"
            weights[f"{prefix}.{name}"] = parameter
        return weights

    def trained_weights(self) -> dict[str, Tensor]:
        """What, with the model it started from, makes the policy: see `weights.install`."""
        weights = {name: p.detach() for name, p in self.policy_weights().items()}
        if self.config.trainable == "lora":
            weights[SCALING] = self._scaling()
        return weights

    def _scaling(self) -> Tensor:
        return torch.tensor(self.config.lora.alpha / self.config.lora.rank)

    def critic_weights(self) -> list[nn.Parameter]:
        """The critic's own parameters: its layers or adapter if it has any, and the value head."""
        if self.critic is None:
            return list(self.value_head.parameters())
        lora = self.config.trainable == "lora"
        own = adapter_weights(self.critic.decoder).values() if lora else self.critic.parameters()
        return [*own, *self.value_head.parameters()]

    def critic_state(self) -> dict[str, Tensor]:
        """What, with the layers it started from, makes the critic: see `load_critic`."""
        parts: dict[str, dict[str, Any]] = {_VALUE_HEAD: dict(self.value_head.named_parameters())}
        if self.critic is not None:
            lora = self.config.trainable == "lora"
            own = adapter_weights(self.critic.decoder) if lora else dict(self.critic.decoder.named_parameters())
            parts[_CRITIC] = own | ({SCALING: self._scaling()} if lora else {})
        return {f"{part}.{name}": t.detach() for part, tensors in parts.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load_policy(self, weights: Mapping[str, Tensor]) -> None:
        """Answer as the whole model with these weights does. Not for `lora`, whose policy is no model of its own."""
        for name, parameter in self.policy_weights().items():
            parameter.copy_(weights[name])

    def load_critic(self, state: Mapping[str, Tensor]) -> None:
        """Value as the critic of this `critic_state` did. Its adapter is merged: this model may have none of its own.

        Raises KeyError or RuntimeError for the state of a critic that was not built like this one.
        """
        parts: dict[str, dict[str, Tensor]] = {_VALUE_HEAD: {}, _CRITIC: {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        if bool(parts[_CRITIC]) != (self.critic is not None):
            raise KeyError("the layers of a separate critic" if self.critic else "no layers: the critic is shared")
        if self.critic is not None:
            install(self.critic.decoder, parts[_CRITIC])
        self.value_head.load_state_dict(parts[_VALUE_HEAD])

    @torch.no_grad()
    def activations(self, sequences: Sequences) -> Tensor:
        """What every top starts from: trunk output [B, T, D], or the token ids [B, T] where there is no trunk."""
        return sequences.tokens if self.trunk is None else self.trunk(sequences.tokens, sequences.attention)

    def policy_features(self, activations: Tensor, sequences: Sequences) -> Tensor:
        """What the policy makes [N, D] of the positions before the response tokens that count, row after row."""
        return _before_tokens(self.policy, activations, sequences)

    def critic_features(self, activations: Tensor, sequences: Sequences) -> Tensor:
        """The same of a critic of its own; a shared one reads the policy's."""
        assert self.critic is not None
        return _before_tokens(self.critic, activations, sequences)

    def evaluate(self, activations: Tensor, sequences: Sequences, law: SamplingLaw) -> TokenEvaluation:
        """Log-probabilities, entropies and values of the response tokens under policy and critic."""
        hidden, mask = self.policy_features(activations, sequences), sequences.mask
        logprobs, entropy = law_of_tokens(self.policy_head, hidden, sequences.counted, law)
        values = self.value_head(hidden if self.critic is None else self.critic_features(activations, sequences))
        return TokenEvaluation(*(in_place(found, mask) for found in (logprobs, entropy, values)))

    @torch.no_grad()
    def language_model_logprobs(self, sequences: Sequences, activations: Tensor | None = None) -> Tensor:
        """The policy's log-probabilities [B, R] of text that people wrote: at temperature 1, nothing left out.

        `activations` are those of `activations(sequences)`, if they are known.
        """
        if activations is None:
            activations = self.activations(sequences)
        hidden = self.policy_features(activations, sequences)
        law = SamplingLaw(SamplingConfig(), ())
        return in_place(logprobs_of_tokens(self.policy_head, hidden, sequences.counted, law), sequences.mask)

    @torch.no_grad()
    def reference_logprobs(self, activations: Tensor, sequences: Sequences, law: SamplingLaw) -> Tensor:
        """Log-probabilities [B, R] of the response tokens under the reference."""
        hidden = _before_tokens(self.reference, activations, sequences)
        return in_place(logprobs_of_tokens(self.reference_head, hidden, sequences.counted, law), sequences.mask)

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """Forward passes whose backward pass follows: transformers checkpoints activations in training mode only."""
        if not self.config.gradient_checkpointing:
            yield
            return
        for stack in self._trained_stacks():
            stack.train()
        try:
            yield
        finally:
            for stack in self._trained_stacks():
                stack.eval()

    def _trained_stacks(self) -> list[Stack]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]


_CRITIC_START = "ppo.model.critic_start"
_VALUE_HEAD, _CRITIC = "value_head", "critic"
"""What the names in a `critic_state` begin with."""


def _before_tokens(stack: Stack, activations: Tensor, sequences: Sequences) -> Tensor:
    """Hidden states [N, D] of the positions before the response tokens that count."""
    hidden: Tensor = stack(activations, sequences.attention)
    return hidden[:, sequences.prompt_length - 1 : -1][sequences.mask]


def _prefixed(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _name_of(model: Any, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _decoder_name(model: Any) -> str:
    return _name_of(model, model.get_decoder())
