"""A causal LM of transformers, cut across its layers: a frozen trunk below, tops that differ above.

Policy, reference, critic and reward model may share one trunk, which then runs once for all of them. Decoders built
like Llama's run packed (`packed`; sampling: `llama`), others through their own transformers code. A trunk of depth 0 is
the identity on token ids: the tops are then whole models.

Shapes: B batch, T position in prompt + response, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import errno
import inspect
import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ppo_core import packed
from ppo_core.device import device
from ppo_core.errors import ConfigError, IntegrityError
from ppo_core.linear import LinearMap, fixed_linear
from ppo_core.packed import obstacle_to_packing


def load_causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    """The transformers model in `folder` (safetensors only, no remote code), `frozen`.

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
    return frozen(model)


def frozen(model: Any) -> Any:
    """A model that was just loaded, on the device that computes (`device`), prepared and without gradients."""
    return prepared(model.to(device())).requires_grad_(False).eval()


def prepared(model: Any) -> Any:
    """Make a model fit for training by PPO: no dropout, with which the first ratio would not be 1; fast attention."""
    from ppo_core.attention import use_float32_attention

    use_float32_attention(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _no_rates(module)  # of dropout that is a function, and of whole layers (OPT)
    _no_rates(model.config)
    return model


def _no_rates(owner: Any) -> None:
    for key, value in vars(owner).items():
        if key.endswith(("dropout", "pdrop", "layerdrop", "jitter_noise")) and isinstance(value, float):
            setattr(owner, key, 0.0)


class LMHead(nn.Module):
    """Hidden states [.., D] to logits [.., V], as the model's own forward makes them.

    Beyond the output layer that is a scale (Cohere, Granite) or a cap (Gemma 2), which the configuration names.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.linear = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1.0
        self.scale /= getattr(config, "logits_scaling", None) or 1.0
        self.cap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._shaped(self.linear(hidden))

    def fixed(self) -> LinearMap:
        """The same for decoding, with the weights as they are now."""
        product = fixed_linear(self.linear.weight, self.linear.bias)
        return lambda hidden: self._shaped(product(hidden))

    def _shaped(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def takes_positions(decoder: nn.Module) -> bool:
    """Whether a decoder is told where tokens stand; Bloom's reads it from the attention mask."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


class Stack(nn.Module):
    """Consecutive layers of a decoder, run packed where they can be, else by the decoder's own forward."""

    may_pack = True
    """False for what is compared with a stack that cannot run packed, so that their rounding does not differ."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        """Hidden states [B, T, D] from token ids [B, T] or hidden states [B, T, D].

        `attention` [B, T] is True where a token stands; padding may lie on either side, and what comes out there means
        nothing.
        """
        if self.may_pack and obstacle_to_packing([self.decoder]) is None:
            return packed.run(self.decoder, x, attention)
        return self.plain(x, attention)

    def plain(self, x: Tensor, attention: Tensor) -> Tensor:
        """The same by the decoder's own forward."""
        inputs = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
        if takes_positions(self.decoder):
            inputs["position_ids"] = (attention.cumsum(dim=1) - 1).clamp(min=0)
        out = self.decoder(**inputs, attention_mask=attention.long(), use_cache=False)
        return out.last_hidden_state

    def checkpoint_activations(self) -> None:
        """From now on, in training mode, compute activations again in the backward pass instead of keeping them."""
        decoder: Any = self.decoder
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def depth_of(stack: Stack) -> int:
    """Number of layers of a stack."""
    decoder: Any = stack.decoder
    return len(decoder.layers)


def same_weights(one: Stack, other: Stack) -> bool:
    """Whether two stacks are the same network: not equal, but on the very same weights."""
    pairs = zip_longest(one.parameters(), other.parameters())
    return all(a is b for a, b in pairs)


def split(model: Any, top_layers: int) -> tuple[Stack, Stack]:
    """Cut `model` so that the upper stack has `top_layers` layers and the final norm; weights are shared, not copied.

    Raises ConfigError if the model has no more layers than that, or is not built like Llama or GPT-NeoX (embeddings,
    layers, final norm, and nothing else that works on hidden states).
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or norm_of(decoder) is None:
        raise ConfigError(
            f"{type(model).__name__} is not built from layers and a final norm, so it cannot be cut",
            "ppo.model and reward_model.top_layers",
            _WITHOUT_A_CUT,
        )
    layers = decoder.layers
    if not 0 < top_layers < len(layers):
        raise ConfigError(
            f"cannot train the top {top_layers} of {len(layers)} layers",
            "ppo.model.top_layers or reward_model.top_layers",
            f"choose 1 to {len(layers) - 1}; to train all of the policy, set ppo.model.trainable to full",
        )
    cut = len(layers) - top_layers
    if len(set(getattr(decoder.config, "layer_types", None) or ())) > 1:
        # transformers picks a layer's mask by its place in the stack, which the cut moves.
        raise ConfigError(
            "mixes kinds of attention across its layers, which a cut would confuse",
            type(model).__name__,
            _WITHOUT_A_CUT,
        )
    norm = norm_of(decoder)
    assert norm is not None
    trunk, top = _with(decoder, layers[:cut], nn.Identity()), _with(decoder, layers[cut:], getattr(decoder, norm))
    for name in _EMBEDDINGS:  # a top starts from hidden states; its state is its layers and norm
        if hasattr(top, name):
            setattr(top, name, None)
    _check_cut(decoder, Stack(trunk), Stack(top))
    return Stack(trunk), Stack(top)


@torch.no_grad()
def _check_cut(decoder: Any, trunk: Stack, top: Stack) -> None:
    """Refuse a decoder that does more to hidden states than its layers do: in the top it would do so twice."""
    tokens = torch.arange(3, 19, device=decoder.device).unsqueeze(0) % decoder.config.get_text_config().vocab_size
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    whole = Stack(decoder).plain(tokens, everywhere).float()
    cut = top.plain(trunk.plain(tokens, everywhere), everywhere).float()
    if not torch.allclose(cut, whole, atol=0.02 * float(whole.abs().max()), rtol=0):
        raise ConfigError(
            "scales or places what its layers get, which a cut would do twice", type(decoder).__name__, _WITHOUT_A_CUT
        )


def join(trunk: Stack | None, top: Stack) -> nn.Module:
    """The decoder that runs trunk and top in one go, on their own weights; it samples."""
    upper: Any = top.decoder
    if trunk is None:
        return upper
    lower: Any = trunk.decoder
    return _with(lower, [*lower.layers, *upper.layers], getattr(upper, norm_of(upper) or ""))


def clone(stack: Stack) -> Stack:
    """A stack with weights of its own."""
    return copy.deepcopy(stack)


def share(module: Any) -> Any:
    """A copy of `module` on the very same weights: what is added to one is not in the other."""
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, kept)


_WITHOUT_A_CUT = (
    "set ppo.model.trainable to lora or full and bring a reward model of your own (ingest.reward), "
    "or choose a model built like Llama"
)
_NORMS = ("norm", "final_layer_norm", "final_layernorm")
_EMBEDDINGS = ("embed_tokens", "embed_in")


def norm_of(decoder: Any) -> str | None:
    """The name of a decoder's final norm, which differs between families."""
    return next((name for name in _NORMS if hasattr(decoder, name)), None)


def _with(decoder: Any, layers: Any, norm: nn.Module) -> Any:
    """A shallow copy of `decoder` with other layers and another final norm."""
    twin = copy.copy(decoder)
    twin._modules = dict(decoder._modules)
    twin.layers = nn.ModuleList(layers)
    name = norm_of(decoder)
    assert name is not None
    setattr(twin, name, norm)
    return twin
