"""A causal LM of transformers, cut across its layers: a frozen trunk below, tops that differ above.

Policy, reference, critic and reward model may share one trunk, which then runs once for all of them. Everything runs
through the model's own transformers code. A trunk of depth 0 is the identity on token ids: the tops are then whole
models.

Shapes: B batch, T position in prompt + response, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ppo_core.errors import ConfigError, IntegrityError


def load_causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model in `folder` (safetensors only, no remote code), frozen, without dropout.

    Raises IntegrityError where it is damaged or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / "config.json"))
    mend = "restore the files that were there"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"does not load: {error}", str(folder), mend) from error
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random weights in their place.
        raise IntegrityError(f"lacks the weights {', '.join(missing)}", str(folder), mend)
    return without_dropout(model).requires_grad_(False).eval()


def without_dropout(model: Any) -> Any:
    """Switch dropout off for good: with it the first ratio would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key, value in vars(model.config).items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


class Stack(nn.Module):
    """Consecutive layers of a decoder, run by the decoder's own forward."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        """Hidden states [B, T, D] from token ids [B, T] or hidden states [B, T, D].

        `attention` [B, T] is True where a token stands; padding may lie on either side.
        """
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
        out = self.decoder(**inputs, attention_mask=attention.long(), position_ids=positions, use_cache=False)
        return out.last_hidden_state


def depth_of(stack: Stack) -> int:
    """Number of layers of a stack."""
    decoder: Any = stack.decoder
    return len(decoder.layers)


def split(model: Any, top_layers: int) -> tuple[Stack, Stack]:
    """Cut `model` so that the upper stack has `top_layers` layers and the final norm; weights are shared, not copied.

    Raises ConfigError if the model has no more layers than that, or is not built like Llama (layers, norm,
    embed_tokens).
    """
    layers = _layers(model)
    if not 0 < top_layers < len(layers):
        raise ConfigError(
            f"cannot train the top {top_layers} of {len(layers)} layers",
            "ppo.model.top_layers or reward_model.top_layers",
            f"choose 1 to {len(layers) - 1}; to train all of the policy, set ppo.model.trainable to full",
        )
    cut = len(layers) - top_layers
    decoder = model.get_decoder()
    if len(set(getattr(decoder.config, "layer_types", None) or ())) > 1:
        # transformers picks a layer's mask by its place in the stack, which the cut moves.
        raise ConfigError(
            "mixes kinds of attention across its layers, which a cut would confuse",
            type(model).__name__,
            "choose a model with one kind of attention",
        )
    trunk, top = _with(decoder, layers[:cut], nn.Identity()), _with(decoder, layers[cut:], decoder.norm)
    top.embed_tokens = None  # a top starts from hidden states; its state is its layers and norm
    return Stack(trunk), Stack(top)


def join(trunk: Stack | None, top: Stack) -> nn.Module:
    """The decoder that runs trunk and top in one go, on their own weights; it samples."""
    upper: Any = top.decoder
    if trunk is None:
        return upper
    lower: Any = trunk.decoder
    return _with(lower, [*lower.layers, *upper.layers], upper.norm)


def clone(stack: Stack) -> Stack:
    """A stack with weights of its own."""
    return copy.deepcopy(stack)


def _layers(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder()
    if not all(hasattr(decoder, name) for name in ("layers", "norm", "embed_tokens")):
        raise ConfigError(
            f"{type(model).__name__} is not built from layers, norm and embed_tokens, so it cannot be cut",
            "ppo.model and reward_model.top_layers",
            "choose a model built like Llama",
        )
    return decoder.layers


def _with(decoder: Any, layers: Any, norm: nn.Module) -> Any:
    """A shallow copy of `decoder` with other layers and another final norm."""
    twin = copy.copy(decoder)
    twin._modules = dict(decoder._modules)
    twin.layers = nn.ModuleList(layers)
    twin.norm = norm
    return twin
