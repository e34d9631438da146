"""A small PPO run on the tiny Llama: its prompts, its parameters, its trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from ppo_core.config import PPOConfig, SamplingConfig
from ppo_core.decoder import load_causal_lm
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.sampling import sample
from ppo_core.trainer import Trainer
from ppo_core.types import Samples

EOS = PAD = 2
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61], [1, 70, 71, 72, 73, 74]]
MODES = [(trainable, critic) for trainable in ("top_layers", "lora", "full") for critic in ("shared", "separate")]


def length_reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    """Likes low token ids."""
    sequences = samples.sequences
    return -(sequences.responses * sequences.mask).sum(dim=1) / 1000.0


def config(trainable: str = "top_layers", critic: str = "shared", **update) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "rollout_size": 8,
            "model": {"trainable": trainable, "top_layers": 2, "critic": critic, "dtype": "float32"}
            | {"critic_start": "policy"},
            "sampling": {"max_new_tokens": 6, "temperature": 0.7},
            "update": {"epochs": 2, "minibatches": 2, "micro_batch": 2, "learning_rate": 1e-3} | update,
        }
    )


def trainer(folder: Path, settings: PPOConfig, seed: int = 3) -> Trainer:
    torch.manual_seed(0)
    model = ActorCritic(load_causal_lm(folder, torch.float32), settings.model)
    return Trainer(model, length_reward, PROMPTS, settings, seed=seed, law=law(settings.sampling), pad=PAD)


def law(settings: SamplingConfig) -> SamplingLaw:
    return SamplingLaw(settings, [EOS])


def draw(model: ActorCritic, prompts: list[list[int]], **sampling) -> Samples:
    settings = SamplingConfig(max_new_tokens=8, **sampling)
    return sample(model.sampler, model.policy_head, prompts, law(settings), range(len(prompts)), PAD)
