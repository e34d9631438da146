"""Attention for bfloat16 models on a CPU, computed in float32.

Torch's fused attention has a backward pass in bfloat16 that takes, at 64 tokens, three to four times what it takes in
float32 with both casts (`python -m benchmarks.attention`). The same function serves passes without a gradient, so that
what is recorded of a rollout is computed as the update computes it, and the first ratio is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_float32"


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`: query [B, H, T, d], key and value [B, G, S, d]; returns [B, T, H, d]."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (x.float() for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return out.to(query.dtype), None


def use_float32_attention(model: Any) -> None:
    """Let a bfloat16 model on a CPU attend in float32, if it attends through torch's fused function at all."""
    on_cpu = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if on_cpu and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
