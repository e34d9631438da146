"""Whole texts through layers built like Llama's: without padding, and with a backward pass that is written out.

Between the matrix products of transformers' layers a CPU spends more time than in them: in casts, in single operations
of autograd, and on padding. Here the tokens of a batch lie one after another, only attention lays them out in rows
(on a GPU not even that), and what a layer keeps for its backward pass is little and in the model's dtype.
Shapes: B batch, T position, N tokens that stand anywhere, L length of the longest row, D width, I the MLP's width,
H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu
from torch.nn.functional import pad as fill

from ppo_core.attention import causal_attention

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [.., 1, d] of the tokens' positions; of the sines, the first half has its sign turned."""
_MOVING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the length of the text."""
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Torch before 2.12 need not be told that query heads share keys."""


def obstacle_to_packing(decoders: Sequence[Any]) -> str | None:
    """Why these decoders cannot run packed, here or in `llama`, in words; None if they can."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for decoder in decoders:
        for layer in getattr(decoder, "layers", [decoder]):
            if type(layer) is not LlamaDecoderLayer:
                return f"{type(layer).__name__} is not Llama's layer"
            if any(type(projection) is not nn.Linear for projection in _projections(layer)):
                return "an adapter sits on its layers"
        config = decoder.config
        if config.attention_bias or config.mlp_bias:
            return "its projections have biases"
        if config.hidden_act != "silu":
            return f"the activation is {config.hidden_act}"
        if (rotation := (config.rope_parameters or {}).get("rope_type", "default")) in _MOVING_ROTATIONS:
            return f"the rotary embedding is {rotation}"
    return None


def _projections(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def run(decoder: Any, x: Tensor, attention: Tensor) -> Tensor:
    """What the decoder makes of token ids [B, T] or hidden states [B, T, D]: [B, T, D], 0 where no token stands.

    `attention` [B, T] is True where one does. For decoders without an `obstacle_to_packing`.
    """
    layout = Layout.of(attention)
    hidden = layout.packed(x)
    if not hidden.is_floating_point():
        embed = decoder.embed_tokens
        # The gradient of the few rows that were read; a master adds it to its own. To be its own, it must be whole.
        sparse = _on_cpu_in_bfloat16(embed.weight)
        hidden = embedding(hidden, embed.weight, embed.padding_idx, sparse=sparse)
    rotation = rotation_at(decoder, layout.positions, hidden.dtype)
    for layer in decoder.layers:
        own, mlp = layer.self_attn, layer.mlp
        norm, projections = layer.input_layernorm, (own.q_proj.weight, own.k_proj.weight, own.v_proj.weight)
        query, key, value = _Project.apply(  # type: ignore[no-untyped-call]
            hidden, norm.weight, *projections, rotation, norm.variance_epsilon
        )
        read = layout.attend(query, key, value, own.scaling)
        norm, weights = layer.post_attention_layernorm, (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        hidden = _Transform.apply(  # type: ignore[no-untyped-call]
            hidden, read, own.o_proj.weight, norm.weight, *weights, norm.variance_epsilon
        )
    return layout.unpacked(decoder.norm(hidden))


def rotation_at(decoder: Any, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """The decoder's rotation at `positions` [..], in `dtype`."""
    cos, sin = decoder.rotary_emb(torch.empty(0, dtype=dtype, device=positions.device), positions.reshape(1, -1))
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos.view(*positions.shape, 1, -1), sin.view(*positions.shape, 1, -1)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [.., heads, d] turned by their positions (Su et al. 2021, RoFormer, equation 34)."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand."""

    shape: torch.Size
    """B, T."""
    longest: int
    positions: Tensor
    """[N] of each token in its row."""
    found: Tensor | None
    """[N] places of the tokens among B * T; None where every place has one."""
    rows: Tensor | None
    """[N] places among B * L, where each row begins with its first token; None likewise."""
    ends: Tensor
    """[B + 1] int32: 0, and where each row ends among the N."""

    @classmethod
    def of(cls, attention: Tensor) -> Layout:
        places = attention.cumsum(dim=1) - 1
        ends = fill(attention.sum(dim=1).cumsum(dim=0, dtype=torch.int32), (1, 0))
        if bool(attention.all()):
            return cls(attention.shape, attention.shape[1], places.flatten(), None, None, ends)
        found = attention.flatten().nonzero().squeeze(1)
        positions, longest = places.flatten()[found], int(places.max()) + 1
        return cls(attention.shape, longest, positions, found, found // attention.shape[1] * longest + positions, ends)

    def packed(self, x: Tensor) -> Tensor:
        """[B, T, ..] to [N, ..]."""
        flat = x.flatten(0, 1)
        return flat if self.found is None else flat.index_select(0, self.found)

    def unpacked(self, x: Tensor) -> Tensor:
        """[N, ..] to [B, T, ..]."""
        return _spread(x, self.found, self.shape[0] * self.shape[1]).unflatten(0, self.shape)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[N, H * d] from queries [N, H, d], keys and values [N, G, d].

        What follows a row's last token is no token; as none looks ahead, none sees it.
        """
        shape = (self.shape[0], self.longest)
        if _flashes(query):
            ends, longest = self.ends, self.longest
            read = varlen_attn(
                query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **_SHARED_KEYS
            )
            return read.flatten(1)  # type: ignore[union-attr]

        def laid_out(x: Tensor) -> Tensor:
            return _spread(x, self.rows, shape[0] * shape[1]).unflatten(0, shape).transpose(1, 2)

        query, key, value = laid_out(query), laid_out(key), laid_out(value)
        if _on_cpu_in_bfloat16(query):
            read = causal_attention(query, key, value, scale)
        else:
            read = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        flat = read.transpose(1, 2).flatten(2).flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)


def _flashes(query: Tensor) -> bool:
    """Whether torch's flash attention takes such queries [N, H, d] as they are, of texts one after another."""
    if not query.is_cuda or query.dtype == torch.float32 or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _on_cpu_in_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _spread(x: Tensor, places: Tensor | None, room: int) -> Tensor:
    """The rows of x [N, ..] at `places` among `room`, and 0 elsewhere."""
    return x if places is None else x.new_zeros(room, *x.shape[1:]).index_copy(0, places, x)


class _Project(torch.autograd.Function):
    """Norm, projections and rotation: hidden states [N, D] to queries [N, H, d], keys and values [N, G, d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, scale = normalised(x, norm, eps)
        cos, sin = rotation
        query, key, value = (linear(y, w).unflatten(-1, (-1, cos.shape[-1])) for w in (q, k, v))
        ctx.save_for_backward(x, scale, y, norm, q, k, v, cos, sin)
        return rotated(query, rotation), rotated(key, rotation), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, y, norm, *weights, cos, sin = ctx.saved_tensors
        back = (cos, -sin)
        turned = (rotated(grads[0], back), rotated(grads[1], back), grads[2])
        of_outputs = [grad.flatten(1) for grad in turned]
        of_weights = [_of_weight(ctx, 2 + i, grad, y) for i, grad in enumerate(of_outputs)]
        if not any(ctx.needs_input_grad[:2]):
            return None, None, *of_weights, None, None
        of_x, of_norm = _of_normalised(_sum_of_products(of_outputs, weights), x, scale, norm)
        return of_x.to(x.dtype), of_norm, *of_weights, None, None


class _Transform(torch.autograd.Function):
    """The rest of a layer: what attention read [N, D] is projected and added to x [N, D]; norm and MLP likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Tensor, out: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        x = x + linear(read, out)
        y, scale = normalised(x, norm, eps)
        gated, upped = linear(y, gate), linear(y, up)
        opened = silu(gated)
        ctx.save_for_backward(x, read, scale, y, gated, opened, upped, out, norm, gate, up, down)
        return x + linear(opened * upped, down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, read, scale, y, gated, opened, upped, out, norm, gate, up, down = ctx.saved_tensors
        (grad,) = grads
        of_down = _of_weight(ctx, 6, grad, opened * upped)
        inner = grad @ down
        of_gated = torch.ops.aten.silu_backward(inner * upped, gated)
        of_upped = inner.mul_(opened)
        of_gate, of_up = _of_weight(ctx, 4, of_gated, y), _of_weight(ctx, 5, of_upped, y)
        of_x, of_norm = _of_normalised(_sum_of_products([of_gated, of_upped], [gate, up]), x, scale, norm)
        grad = of_x.add_(grad).to(x.dtype)
        of_out = _of_weight(ctx, 2, grad, read)
        return grad, grad @ out, of_out, of_norm, of_gate, of_up, of_down, None


def _of_weight(ctx: Any, i: int, grad: Tensor, x: Tensor) -> Tensor | None:
    """The gradient [out, in] of input `i`, a linear layer's weight; None where nobody trains it."""
    return grad.t() @ x if ctx.needs_input_grad[i] else None


def _sum_of_products(grads: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The gradient [N, in] of what several linear layers read."""
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total = torch.addmm(total, grad, weight)
    return total


def normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Divide x [N, D] by its root mean square (Zhang and Sennrich 2019), and return the factors [N, 1], too."""
    if x.is_cuda:  # where torch has a kernel for it; on a CPU that takes longer than what follows
        y, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        return y, scale
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight.float()).to(x.dtype), scale


def _of_normalised(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, in float32 on a CPU, and of the weight.

    With n = x s and y = n w: dw = sum dy n, and as s depends on x, dx = s (dy w - n mean(dy w n)).
    """
    if x.is_cuda:
        of_x, of_norm = torch.ops.aten._fused_rms_norm_backward(grad, x, weight.shape, scale, weight, (True, True))
        return of_x, of_norm
    grad, unit = grad.float(), x.float() * scale
    products = grad * unit
    mean = (products @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)
    of_x = (grad * weight.float()).addcmul_(unit, mean, value=-1).mul_(scale)
    return of_x, products.sum(dim=0).to(weight.dtype)
