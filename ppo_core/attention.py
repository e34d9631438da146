"""Attention for bfloat16 models on a CPU, where the backward pass of torch's fused one is slow.

Transformers' own layers attend in float32, which with both casts is faster; packed layers by a function written out.
Each serves passes without a gradient, too, so that what is recorded of a rollout is computed as the update computes it,
and the first ratio is 1.
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


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention in bfloat16 on a CPU, where the backward pass of torch's fused one takes five times as long.

    [B, H, L, d] from queries [B, H, L, d], keys and values [B, G, L, d]. Query heads that share keys are rows of one
    product.
    """
    batch, groups, length, _ = key.shape
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    hidden = torch.zeros(ahead.shape, dtype=query.dtype, device=query.device).masked_fill(ahead, -torch.inf)
    rows = query.reshape(batch * groups, -1, query.shape[-1])
    hidden = hidden.repeat(rows.shape[1] // length, 1)
    read: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        rows, key.flatten(0, 1), value.flatten(0, 1), hidden, scale
    )
    return read.view(query.shape)


class _Attend(torch.autograd.Function):
    """softmax(q k^T s + hidden) v, for q [M, R, d], k and v [M, L, d], hidden [R, L]: weights are not kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return torch.bmm(_attention_weights(q, k, hidden, scale), v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden = ctx.saved_tensors
        (grad,) = grads
        weights = _attention_weights(q, k, hidden, ctx.scale)
        of_weights = torch.bmm(grad, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, q.dtype).mul_(ctx.scale)
        of_v = torch.bmm(weights.transpose(1, 2), grad)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_v, None, None


def _attention_weights(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale).softmax(dim=-1)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
