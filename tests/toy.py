"""A causal LM with a vocabulary of a dozen tokens, and a trainer on it: milliseconds an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_core.config import PPOConfig
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.rollout import RewardFunction
from ppo_core.trainer import Trainer
from ppo_core.types import Samples

VOCABULARY = 12
PAD, EOS, STOP = 0, 1, 2
PROMPTS = [[3], [4, 5], [6, 7, 8], [9, 10, 11, 3]]


def toy_model(vocabulary: int = VOCABULARY, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A frozen Llama of 2 layers x 16 whose random laws are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


def toy_config(**sections: Any) -> PPOConfig:
    """Rollouts of 8 in 2 epochs of 2 minibatches, all weights trained in float32, nothing else that stops or clips.

    `sections` are merged into it, one level deep.
    """
    base: dict[str, Any] = {
        "rollout_size": 8,
        "model": {"trainable": "full", "top_layers": 1, "dtype": "float32", "critic_start": "policy"},
        "sampling": {"max_new_tokens": 6},
        "update": {"micro_batch": 4, "learning_rate": 1e-2, "critic_learning_rate": 1e-2},
        "health": {"patience": 1000},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section if isinstance(section, dict) else section
    return PPOConfig.model_validate(base)


def id_sum(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    """A score that likes high token ids, hence long responses."""
    sequences = samples.sequences
    return (sequences.responses * sequences.mask).sum(dim=1) / 10.0


def toy_trainer(
    config: PPOConfig,
    reward: RewardFunction = id_sum,
    *,
    model: Any = None,
    prompts: Sequence[list[int]] = PROMPTS,
    seed: int = 3,
    ptx: Sequence[Sequence[int]] = (),
) -> Trainer:
    """A trainer on `model` or a new toy, whose value head is not zero, so that what it does shows at once."""
    actor_critic = ActorCritic(toy_model() if model is None else model, config.model)
    weight = actor_critic.value_head.linear.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    law = SamplingLaw(config.sampling, [EOS, STOP])
    return Trainer(actor_critic, reward, prompts, config, seed=seed, law=law, pad=PAD, ptx=ptx)


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all trained weights, in float32."""
    return [master.clone() for master in trainer.optimiser.weights.state()]


def equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
