"""Attention for bfloat16 models on a CPU, computed in float32.

The backward pass of torch's fused attention takes longer in bfloat16 than in float32 with both casts. The same function
serves passes without a gradient, so that what is recorded of a rollout is computed as the update computes it, and the
first ratio is 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

NAME = "sdpa_in_float32"


def use_float32_attention(model: Any) -> None:
    """Let a bfloat16 model on a CPU attend in float32, if it attends through torch's fused function at all."""
    on_cpu = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if on_cpu and model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`: query [B, H, T, d], key and value [B, G, S, d]; returns [B, T, H, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    # A single query is decoding, of which nothing is kept: the cache is not cast anew for every token.
    if query.shape[2] > 1:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out.to(dtype), None


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
