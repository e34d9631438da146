"""Decoding for models built like Llama: few, large products a layer, and keys and values written in their place.

Transformers' own layers make some forty calls each for a token; on a CPU those cost more than the arithmetic. Here
query, key and value are one product, gate and up another, and tokens are written into a cache that has room.
Shapes: B batch, t new tokens, S tokens so far, D width,  H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from ppo_core.packed import Rotation, normalised, rotated, rotation_at

BLOCK = 32
"""Tokens by which a cache grows."""


class LlamaDecoding:
    """A batch on its way: tokens in, hidden states out, keys and values of what came before in a cache."""

    @torch.no_grad()
    def __init__(self, decoders: Sequence[Any]) -> None:
        """`decoders` are consecutive stacks of one model; their weights are joined as they are now."""
        first = decoders[0]
        self.first = first
        self.stacks = [([_Packed(layer) for layer in decoder.layers], decoder.norm) for decoder in decoders]
        self.groups, self.width = first.config.num_key_value_heads, first.layers[0].self_attn.head_dim
        self.length = 0
        self.cache: list[Tensor | None] = [None] * sum(len(layers) for layers, _ in self.stacks)
        """[2, B, G, C, d] for each layer, keys and values; C is S rounded up to a whole number of blocks."""

    @torch.no_grad()
    def step(self, tokens: Tensor, attention: Tensor, positions: Tensor, trunk_only: bool = False) -> list[Tensor]:
        """The output [B, t, D] of each stack for the newest tokens [B, t]; `attention` covers all tokens so far."""
        hidden, outputs, i = self.first.embed_tokens(tokens), list[Tensor](), 0
        first, self.length = self.length, self.length + tokens.shape[1]
        new = slice(first, self.length)
        rotation = rotation_at(self.first, positions, hidden.dtype)
        allowed = self._allowed(attention, new, hidden.dtype)
        for layers, norm in self.stacks[: 1 if trunk_only else None]:
            for layer in layers:
                self.cache[i] = cache = self._with_room(self.cache[i], hidden)
                hidden = layer(hidden, rotation, allowed, cache, new)
                i += 1
            hidden = norm(hidden)
            outputs.append(hidden)
        return outputs

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for i, cache in enumerate(self.cache):
            self.cache[i] = None if cache is None else cache[:, rows]

    def _with_room(self, cache: Tensor | None, like: Tensor) -> Tensor:
        """A layer's cache with room for `length` tokens.

        It is read as a whole, which is faster if nothing lies between its rows: so it grows by blocks, and is copied.
        """
        room = 0 if cache is None else cache.shape[3]
        if room >= self.length and cache is not None:
            return cache
        larger = like.new_zeros(2, len(like), self.groups, self._capacity, self.width)
        if cache is not None:
            larger[:, :, :, :room] = cache
        return larger

    @property
    def _capacity(self) -> int:
        return -(-self.length // BLOCK) * BLOCK

    def _allowed(self, attention: Tensor, new: slice, dtype: torch.dtype) -> Tensor:
        """What each new token attends to, as numbers [B, 1, t, C] to be added to scores."""
        places = torch.arange(self._capacity, device=attention.device)
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
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.scale, self.width = attention.scaling, attention.head_dim

    def __call__(self, x: Tensor, rotation: Rotation, allowed: Tensor, cache: Tensor, new: slice) -> Tensor:
        """[B, t, D] to [B, t, D]; the places `new` of `cache` [2, B, G, C, d] are filled in."""
        before, after = self.norms
        mixed = linear(_norm(before, x), self.qkv).unflatten(-1, (-1, self.width))  # [B, t, H + 2 G, d]
        groups = cache.shape[2]
        turned = rotated(mixed[:, :, :-groups], rotation).transpose(1, 2)
        cache[0, :, :, new], cache[1, :, :, new] = turned[:, -groups:], mixed[:, :, -groups:].transpose(1, 2)
        read = self._attend(turned[:, :-groups], allowed, *cache)
        x = x + linear(read.transpose(1, 2).flatten(2), self.out)
        gate, up = linear(_norm(after, x), self.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate).mul_(up), self.down)

    def _attend(self, query: Tensor, allowed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, H, t, d] from queries [B, H, t, d], keys and values [B, G, C, d]."""
        if query.shape[2] > 1:
            return scaled_dot_product_attention(query, keys, values, allowed, scale=self.scale, enable_gqa=True)
        # For a single token torch's fused attention takes twice as long as the two products it consists of. Query heads
        # that share keys are rows of one product.
        batch, groups = keys.shape[:2]
        grouped = (query * self.scale).reshape(batch * groups, -1, self.width)
        scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, groups)).add_(allowed)
        return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), values.flatten(0, 1)).reshape(query.shape)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return normalised(x, norm.weight, norm.variance_epsilon)[0]
