"""A small PPO run on the tiny Llama: its prompts, its parameters, its trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad as fill

from ppo_core.config import PPOConfig, SamplingConfig
from ppo_core.decoder import load_causal_lm
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.rollout import RewardFunction
from ppo_core.sampling import sample
from ppo_core.trainer import Trainer
from ppo_core.types import Samples, Sequences

EOS = PAD = 2
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61], [1, 70, 71, 72, 73, 74]]
Figures = dict[str, float]
MODES = [(trainable, critic) for trainable in ("top_layers", "lora", "full") for critic in ("shared", "separate")]


def length_reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    """Likes low token ids."""
    sequences = samples.sequences
    return -(sequences.responses * sequences.mask).sum(dim=1) / 1000.0


def config(
    trainable: str = "top_layers", critic: str = "shared", start: str = "policy", sampling: Any = None, **update
) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "rollout_size": 8,
            "model": {"trainable": trainable, "top_layers": 2, "critic": critic, "dtype": "float32"}
            | {"critic_start": start},
            "sampling": {"max_new_tokens": 6, "temperature": 0.7} | (sampling or {}),
            "update": {"epochs": 2, "minibatches": 2, "micro_batch": 2, "learning_rate": 1e-3} | update,
        }
    )


def trainer(folder: Path, settings: PPOConfig, seed: int = 3) -> Trainer:
    return trainer_of(load_causal_lm(folder, torch.float32), settings, seed)


def trainer_of(
    model: Any, settings: PPOConfig, seed: int = 3, reward: RewardFunction = length_reward, **parts: Any
) -> Trainer:
    """A trainer of a transformers model; `parts` are further arguments of ActorCritic."""
    actor_critic = ActorCritic(model, settings.model, **parts)
    return Trainer(actor_critic, reward, PROMPTS, settings, seed=seed, law=law(settings.sampling), pad=PAD)


def law(settings: SamplingConfig) -> SamplingLaw:
    return SamplingLaw(settings, [EOS])


def draw(model: ActorCritic, prompts: list[list[int]], **sampling) -> Samples:
    settings = SamplingConfig(max_new_tokens=8, **sampling)
    return sample(model.sampler, model.policy_head, prompts, law(settings), range(len(prompts)), PAD)


@torch.no_grad()
def perturb(parameters: Iterable[torch.Tensor], scale: float = 0.05, seed: int = 1) -> None:
    """Noise of the parameters' own size, or of `scale` where they are zero: what training might have done."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += scale * noise * (1.0 if not parameter.any() else float(parameter.abs().mean()) * 4)


def padded(sequences: Sequences, left: int, right: int) -> Sequences:
    """The same with more columns of padding, in which anything may stand."""
    tokens = fill(sequences.tokens, (left, right), value=77)
    tokens = torch.where(fill(sequences.attention, (left, right)), tokens, 99)
    kept = None if sequences.kept is None else fill(sequences.kept, (0, 0, 0, right), value=-1)
    return Sequences(tokens, fill(sequences.attention, (left, right)), sequences.prompt_length + left, kept)


def digest(module: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers, bit for bit."""
    tensors = [*module.parameters(), *module.buffers()]
    return hashlib.sha256(b"".join(t.detach().float().numpy().tobytes() for t in tensors)).hexdigest()


def same_figures(here: list[Figures], there: list[Figures], within: float = 1e-4) -> None:
    """That each step there came to what it came to here, times aside."""
    for one, other in zip(here, there, strict=True):
        timeless = {name: value for name, value in one.items() if not name.endswith("_s")}
        assert {name: other[name] for name in timeless} == pytest.approx(timeless, rel=within, abs=within)
