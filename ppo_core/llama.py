"""Decoding for models built like Llama: few, large products a layer, and keys and values written in their place.

Transformers' own layers make some forty calls each for a token, which cost more than the arithmetic. Here query, key
and value are one product, gate and up another, and tokens are written into a cache that has room. On a GPU a token's
calls are recorded once and then replayed as one (`graphs`).
Shapes: B batch, P prompt, S tokens so far, D width, H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, silu

from ppo_core.graphs import Graph
from ppo_core.packed import Rotation, rotated, rotation_at, run

BLOCK, GPU_BLOCK = 32, 128
"""Tokens by which a cache grows: on a GPU in longer strides, as each ends a graph."""


class LlamaDecoding:
    """A batch on its way: tokens in, hidden states out, keys and values of what came before in a cache."""

    @torch.no_grad()
    def __init__(self, decoders: Sequence[Any]) -> None:
        """`decoders` are consecutive stacks of one model; their weights are joined as they are now."""
        self.first = decoders[0]
        self.stacks: list[_Stack] = [(decoder, [_Packed(layer) for layer in decoder.layers]) for decoder in decoders]
        self.length = 0
        self.on_gpu = self.first.embed_tokens.weight.device.type == "cuda"
        self.graph: Graph | None = None
        """Of one more token, for the caches as they are now."""
        self.cache: list[Tensor] = []
        """[2, B, G, C, d] for each layer, keys and values; C is S rounded up to a whole number of blocks."""

    @torch.no_grad()
    def step(self, tokens: Tensor, attention: Tensor, positions: Tensor, trunk_only: bool = False) -> list[Tensor]:
        """The output [B, t, D] of each stack for the newest tokens [B, t]: first the prompts, then one at a time.

        `attention` [B, S] covers all tokens so far.
        """
        stacks, self.length = self.stacks[: 1 if trunk_only else None], attention.shape[1]
        if self.cache:
            return self._go_on(tokens, attention, positions, stacks)
        return self._read(tokens, attention, stacks)

    def _read(self, tokens: Tensor, attention: Tensor, stacks: Sequence[_Stack]) -> list[Tensor]:
        outputs = [tokens]
        for decoder, _ in stacks:
            outputs.append(run(decoder, outputs[-1], attention, self._keep))
        return outputs[1:]

    def _keep(self, key: Tensor, value: Tensor) -> None:
        cache = self._with_room(key.new_zeros(2, len(key), key.shape[2], 0, key.shape[3]))
        cache[0, :, :, : self.length], cache[1, :, :, : self.length] = key.transpose(1, 2), value.transpose(1, 2)
        self.cache.append(cache)

    def _go_on(self, tokens: Tensor, attention: Tensor, positions: Tensor, stacks: Sequence[_Stack]) -> list[Tensor]:
        if self.cache[0].shape[3] < self.length:
            self.cache, self.graph = [self._with_room(cache) for cache in self.cache], None
        allowed = self._allowed(attention, self.cache[0].dtype)
        inputs = (tokens, positions, allowed, torch.full((1,), self.length - 1, device=tokens.device))
        if not self.on_gpu or len(stacks) < len(self.stacks):
            return self._pass(stacks, *inputs)
        if self.graph is None:
            self.graph = Graph(partial(self._pass, stacks), inputs)
        return self.graph(inputs)

    def _pass(
        self, stacks: Sequence[_Stack], tokens: Tensor, positions: Tensor, allowed: Tensor, place: Tensor
    ) -> list[Tensor]:
        """One token [B, 1] through the stacks; keys and values are written at `place` [1] of the caches."""
        hidden, outputs, caches = self.first.embed_tokens(tokens), list[Tensor](), iter(self.cache)
        rotation = rotation_at(self.first, positions, hidden.dtype)
        for decoder, layers in stacks:
            for layer in layers:
                hidden = layer(hidden, rotation, allowed, next(caches), place)
            hidden = decoder.norm(hidden)
            outputs.append(hidden)
        return outputs

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache, self.graph = [cache[:, rows] for cache in self.cache], None

    def _with_room(self, cache: Tensor) -> Tensor:
        """A layer's cache, which has none, with room for `length` tokens.

        It is read as a whole, which is faster if nothing lies between its rows: so it grows by blocks, and is copied.
        """
        return pad(cache, (0, 0, 0, self._capacity - cache.shape[3]))

    @property
    def _capacity(self) -> int:
        block = GPU_BLOCK if self.on_gpu else BLOCK
        return -(-self.length // block) * block

    def _allowed(self, attention: Tensor, dtype: torch.dtype) -> Tensor:
        """What the newest token attends to, as numbers [B, 1, 1, C] to be added to scores."""
        known = pad(attention, (0, self._capacity - attention.shape[1]))[:, None, None]
        return torch.zeros(known.shape, dtype=dtype, device=known.device).masked_fill(~known, torch.finfo(dtype).min)


class _Packed:
    """A layer whose weights that read the same input are joined, in copies of their own."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.scale, self.width = attention.scaling, attention.head_dim

    def __call__(self, x: Tensor, rotation: Rotation, allowed: Tensor, cache: Tensor, place: Tensor) -> Tensor:
        """[B, 1, D] to [B, 1, D]; the `place` [1] of `cache` [2, B, G, C, d] is filled in."""
        before, after = self.norms
        mixed = linear(_norm(before, x), self.qkv).unflatten(-1, (-1, self.width))  # [B, 1, H + 2 G, d]
        groups = cache.shape[2]
        turned = rotated(mixed[:, :, :-groups], rotation)
        cache[0].index_copy_(2, place, turned[:, :, -groups:].transpose(1, 2))
        cache[1].index_copy_(2, place, mixed[:, :, -groups:].transpose(1, 2))
        x = x + linear(self._attend(turned[:, :, :-groups], allowed, *cache), self.out)
        gate, up = linear(_norm(after, x), self.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate).mul_(up), self.down)

    def _attend(self, query: Tensor, allowed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, 1, H d] from queries [B, 1, H, d], keys and values [B, G, C, d].

        For a single token torch's fused attention takes twice as long as the two products it consists of. Query heads
        that share keys are rows of one product.
        """
        batch, groups = keys.shape[:2]
        grouped = (query * self.scale).reshape(batch * groups, -1, self.width)
        scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, groups)).add_(allowed)
        return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), values.flatten(0, 1)).reshape(batch, 1, -1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


_Stack = tuple[Any, list[_Packed]]
"""A decoder, and its layers as they decode."""
