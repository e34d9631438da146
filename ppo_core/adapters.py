"""Low-rank adapters (Hu et al. 2022, https://arxiv.org/abs/2106.09685), by peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppo_core.config import LoraConfig
from ppo_core.errors import ConfigError

_NAME = "default"
_TARGETS = "ppo.model.lora.target_modules"
_LINEAR = "name linear layers of the model, or set it to all-linear"


def without_adapter(model: Any) -> Any:
    """`model` itself, or, if it carries a peft adapter (from supervised fine-tuning, say), with that merged in.

    Switching such an adapter off would make the model *before* fine-tuning the reference; merged, it stays part of it.
    """
    if hasattr(model, "merge_and_unload"):  # a PeftModel around the model
        return model.merge_and_unload()
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers put the adapter into the model
        _merge(model)
    return model


def _merge(model: Any) -> None:
    """Put the layers that an adapter wraps, its update added to their weights, back in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model._hf_peft_config_loaded = False


def add_adapter(decoder: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give the linear layers of `decoder` an adapter, in place. It changes nothing until it is trained: B is zero.

    Raises ConfigError for target modules that it does not have, or that are not linear.
    """
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
        try:
            peft.inject_adapter_in_model(settings, decoder, _NAME)
        except ValueError as error:  # what peft raises for names that it does not find, or cannot adapt
            raise ConfigError(str(error), _TARGETS, _LINEAR) from error
    if any(".lora_embedding_" in name for name, _ in decoder.named_parameters()):
        raise ConfigError(f"{targets} has an embedding in it", _TARGETS, _LINEAR)


def adapter_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, named as peft saves them."""
    return {
        name.replace(f".{_NAME}.", "."): parameter
        for name, parameter in decoder.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
