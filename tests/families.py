"""Tiny random models of many families: vocabulary 128, hidden 32, 4 layers, 4 heads."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf

from ppo_core.decoder import Stack, prepared
from ppo_core.sampling import Sampler

VOCABULARY = 128
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GRANITE = {"logits_scaling": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _SMALL),
    "Mistral": ("Mistral", _SMALL | {"sliding_window": 4}),  # shorter than the sequences, so that it matters
    "Qwen2": ("Qwen2", _SMALL),
    "Qwen3": ("Qwen3", _SMALL | {"head_dim": 8}),
    "Gemma": ("Gemma", _SMALL | {"head_dim": 8}),
    "Gemma2": ("Gemma2", _SMALL | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}),
    "Gemma3": ("Gemma3Text", _SMALL | {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6}),
    "Granite": ("Granite", _SMALL | _GRANITE),
    "Cohere": ("Cohere", _SMALL | {"logit_scale": 0.25}),
    "Phi": ("Phi", _SMALL | {"num_key_value_heads": 4}),
    "Phi3": ("Phi3", _SMALL),
    "GPT2": ("GPT2", _GPT2),
    "GPTJ": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "GPTNeoX": ("GPTNeoX", _SMALL),
    "OPT": ("OPT", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Bloom": ("Bloom", _SMALL | {"n_layer": 4, "n_head": 4}),
    "Falcon": ("Falcon", _SMALL),
    "Olmo2": ("Olmo2", _SMALL),
    "StableLm": ("StableLm", _SMALL),
}
FAMILIES = list(_CONFIGS)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of `family` in float32, as `load_causal_lm` returns one."""
    return prepared(raw_model(family, seed, **changes)).requires_grad_(False).eval()


def raw_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """The same, as transformers builds it: with dropout, in training mode."""
    kind, small = _CONFIGS[family]
    config = getattr(hf, f"{kind}Config")(**(small | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are ones and biases zeros at first, and could be left out unnoticed
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.2)
    return model


@cache
def plain_model(family: str) -> Any:
    """`tiny_model(family)`, to be read and never changed: what the others are compared with."""
    return tiny_model(family)


def sampler_of(model: Any) -> Sampler:
    """A model that samples as it is, without a trunk of its own."""
    return Sampler(None, Stack(model.get_decoder()))
