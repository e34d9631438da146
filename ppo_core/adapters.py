"""Low-rank adapters (Hu et al. 2022, https://arxiv.org/abs/2106.09685), by peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppo_core.config import LoraConfig

_NAME = "default"


def without_adapter(model: Any) -> Any:
    """`model` itself, or, if it carries a peft adapter (from supervised fine-tuning, say), with that merged in.

    Switching such an adapter off would make the model *before* fine-tuning the reference; merged, it stays part of it.
    """
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload().requires_grad_(False)
    return model


def add_adapter(decoder: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give the linear layers of `decoder` an adapter, in place. It changes nothing until it is trained: B is zero."""
    # Imported here: it takes a second, and only this mode needs it.
    import peft

    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, decoder, _NAME)


def adapter_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, named as peft saves them."""
    return {
        name.replace(f".{_NAME}.", "."): parameter
        for name, parameter in decoder.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
