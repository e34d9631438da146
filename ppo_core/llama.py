"""Decoding for models built like Llama: few, large products a layer, and keys and values written in their place.

Transformers' own layers make some forty calls each for a token; on a CPU those cost more than the arithmetic. Here
query, key and value are one product, gate and up another, and tokens are written into a cache that has room.
Shapes: B batch, t new tokens, S tokens so far, D width,  H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu

BLOCK = 32
"""Tokens by which a cache grows."""
_MOVING_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the length of the text."""


def obstacle_to_packing(decoders: Sequence[Any]) -> str | None:
    """Why these decoders cannot be decoded here, in words; None if they can."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for decoder in decoders:
        for layer in getattr(decoder, "layers", [decoder]):
            if type(layer) is not LlamaDecoderLayer:
                return f"{type(layer).__name__} is not Llama's layer"
            if any(type(projection) is not nn.Linear for projection in _projections(layer)):
                return "an adapter sits on its layers"
        config = decoder.config
        if config.hidden_act != "silu":
            return f"the activation is {config.hidden_act}"
        if (rotation := (config.rope_parameters or {}).get("rope_type", "default")) in _MOVING_ROTATIONS:
            return f"the rotary embedding is {rotation}"
    return None


class LlamaLayers:
    """The layers of consecutive stacks of one model, packed for decoding."""

    @torch.no_grad()
    def __init__(self, decoders: Sequence[Any]) -> None:
        first = decoders[0]
        self.embed, self.rotary = first.embed_tokens, first.rotary_emb
        self.stacks = [([_Packed(layer) for layer in decoder.layers], decoder.norm) for decoder in decoders]
        self.depth = sum(len(layers) for layers, _ in self.stacks)
        self.groups, self.width = first.config.num_key_value_heads, first.layers[0].self_attn.head_dim

    @torch.no_grad()
    def start(self) -> LlamaDecoding:
        """A decoding of a new batch with the weights as they are now."""
        for layers, _ in self.stacks:
            for layer in layers:
                layer.refresh()
        return LlamaDecoding(self)


class LlamaDecoding:
    """A batch on its way: tokens in, hidden states out, keys and values of what came before in a cache."""

    def __init__(self, layers: LlamaLayers) -> None:
        self.layers, self.length = layers, 0
        self.cache: list[Tensor] = []
        """One [2, B, G, C, d] a layer, keys and values; C is S rounded up to a whole number of blocks."""

    @torch.no_grad()
    def step(self, tokens: Tensor, attention: Tensor, positions: Tensor, trunk_only: bool = False) -> list[Tensor]:
        """The output [B, t, D] of each stack for the newest tokens [B, t]; `attention` covers all tokens so far."""
        hidden, outputs, i = self.layers.embed(tokens), list[Tensor](), 0
        first, self.length = self.length, self.length + tokens.shape[1]
        self._make_room(len(tokens), hidden)
        new = slice(first, self.length)
        rotation, allowed = self._rotation(hidden, positions), self._allowed(attention, new, hidden.dtype)
        for layers, norm in self.layers.stacks[: 1 if trunk_only else None]:
            for layer in layers:
                hidden = layer(hidden, rotation, allowed, self.cache[i], new)
                i += 1
            hidden = norm(hidden)
            outputs.append(hidden)
        return outputs

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache = [cache[:, rows] for cache in self.cache]

    def _make_room(self, batch: int, like: Tensor) -> None:
        """Room for `length` tokens. Products read a cache as a whole, and faster if nothing lies between its rows."""
        room = self.cache[0].shape[3] if self.cache else 0
        if (lacking := self.length - room) > 0:
            more = -(-lacking // BLOCK) * BLOCK
            shape = (2, batch, self.layers.groups, room + more, self.layers.width)
            old, self.cache = self.cache, [like.new_zeros(shape) for _ in range(self.layers.depth)]
            for cache, before in zip(self.cache, old, strict=False):
                cache[:, :, :, :room] = before

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, t, d] of the positions; of the sines, the first half has its sign turned."""
        cos, sin = self.layers.rotary(hidden, positions)
        half = self.layers.width // 2
        return cos.unsqueeze(1), torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(1)

    def _allowed(self, attention: Tensor, new: slice, dtype: torch.dtype) -> Tensor:
        """What each new token attends to, as numbers [B, 1, t, C] to be added to scores."""
        places = torch.arange(self.cache[0].shape[3], device=attention.device)
        known = pad(attention, (0, len(places) - attention.shape[1]))
        causal = places <= places[new, None]
        allowed = known[:, None, None] & causal
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


class _Packed:
    """A layer whose weights that read the same input are joined, in copies of their own."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms, self.out, self.down = (
            (layer.input_layernorm, layer.post_attention_layernorm),
            attention.o_proj,
            mlp.down_proj,
        )
        self.qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _Joined(mlp.gate_proj, mlp.up_proj)
        self.scale, self.width = attention.scaling, attention.head_dim

    def refresh(self) -> None:
        self.qkv.refresh()
        self.gate_up.refresh()

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor, cache: Tensor, new: slice
    ) -> Tensor:
        """[B, t, D] to [B, t, D]; the places `new` of `cache` [2, B, G, C, d] are filled in."""
        before, after = self.norms
        mixed = self.qkv(_norm(before, x)).unflatten(-1, (-1, self.width)).transpose(1, 2)  # [B, H + 2 G, t, d]
        (cos, sin), groups = rotation, cache.shape[2]
        turning = mixed[:, :-groups]
        turned = torch.addcmul(turning * cos, turning.roll(self.width // 2, dims=-1), sin)
        cache[0, :, :, new], cache[1, :, :, new] = turned[:, -groups:], mixed[:, -groups:]
        read = self._attend(turned[:, :-groups], allowed, *cache)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(_norm(after, x)).chunk(2, dim=-1)
        return x + self.down(silu(gate).mul_(up))

    def _attend(self, query: Tensor, allowed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, H, t, d] from queries [B, H, t, d], keys and values [B, G, C, d]."""
        if query.shape[2] > 1:
            return scaled_dot_product_attention(query, keys, values, allowed, scale=self.scale, enable_gqa=True)
        # For a single token torch's fused attention takes twice as long as the two products it consists of. Query heads
        # that share keys are rows of one product.
        batch, groups = keys.shape[:2]
        grouped = query.reshape(batch * groups, -1, self.width)
        added = allowed.expand(batch, groups, grouped.shape[1], -1).reshape(batch * groups, grouped.shape[1], -1)
        scores = torch.baddbmm(added, grouped, keys.flatten(0, 1).transpose(1, 2), alpha=self.scale)
        return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).reshape(query.shape)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


class _Joined:
    """Linear layers of one input as one product."""

    def __init__(self, *parts: nn.Linear) -> None:
        self.parts = parts
        self.weight = torch.cat([part.weight for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def refresh(self) -> None:
        """Take over what training has made of the parts."""
        torch.cat([part.weight for part in self.parts], out=self.weight)
        if self.bias is not None:
            torch.cat([part.bias for part in self.parts], out=self.bias)


def _projections(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]
