"""Decoding for models built like Llama: few, large products a layer, and keys and values written in their place.

Transformers' own layers make some forty calls each for a token, which cost more than the arithmetic. Here query, key
and value are one product, gate and up another, and tokens are written into a cache that has room. On a GPU a token's
calls are recorded once and then replayed as one (`graphs`).
Shapes: B batch, P prompt, S tokens so far, N tokens that stand anywhere in the prompts or one of each row, D width,
H query heads, G key-value heads, d head width, C places in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from ppo_core.graphs import Graph
from ppo_core.linear import LinearMap, fixed_linear
from ppo_core.packed import Layout, Rotation, normalised, rotated, rotation_at

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
        layout = Layout.of(attention)

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            self.cache.append(self._with_room(torch.stack([layout.unpacked(x).transpose(1, 2) for x in (key, value)])))
            return layout.attend(query, key, value, scale)

        outputs = self._through(stacks, layout.packed(tokens), layout.positions, repeat(attend))
        return [layout.unpacked(hidden) for hidden in outputs]

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
        attends = (partial(_attend, allowed, place, cache) for cache in self.cache)
        outputs = self._through(stacks, tokens.squeeze(1), positions.squeeze(1), attends)
        return [hidden.unsqueeze(1) for hidden in outputs]

    def _through(
        self, stacks: Sequence[_Stack], tokens: Tensor, positions: Tensor, attends: Iterator[_Attend]
    ) -> list[Tensor]:
        """What each stack makes [N, D] of tokens [N]; each layer has one of `attends`."""
        hidden, outputs = self.first.embed_tokens(tokens), list[Tensor]()
        rotation = rotation_at(self.first, positions, hidden.dtype)
        for decoder, layers in stacks:
            for layer in layers:
                hidden = layer(hidden, rotation, next(attends))
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
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _joined(attention.o_proj)
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down = _joined(mlp.down_proj)
        self.scale, self.width = attention.scaling, attention.head_dim
        self.groups = attention.k_proj.out_features // self.width

    def __call__(self, x: Tensor, rotation: Rotation, attend: _Attend) -> Tensor:
        """[N, D] to [N, D]."""
        before, after = self.norms
        mixed = self.qkv(_norm(before, x)).unflatten(-1, (-1, self.width))  # [N, H + 2 G, d]
        turned, value = rotated(mixed[:, : -self.groups], rotation), mixed[:, -self.groups :]
        x = x + self.out(attend(turned[:, : -self.groups], turned[:, -self.groups :], value, self.scale))
        gate, up = self.gate_up(_norm(after, x)).chunk(2, dim=-1)
        return x + self.down(silu(gate).mul_(up))


def _joined(*projections: Any) -> LinearMap:
    """What several projections make of one input, side by side."""
    weights = [projection.weight for projection in projections]
    return fixed_linear(torch.cat(weights) if len(weights) > 1 else weights[0])


def _norm(norm: Any, x: Tensor) -> Tensor:
    return normalised(x, norm.weight, norm.variance_epsilon)[0]


def _attend(
    allowed: Tensor, place: Tensor, cache: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Write keys and values [B, G, d] at `place` [1] of `cache` [2, B, G, C, d]; what queries [B, H, d] read [B, H d].

    For a single token torch's fused attention takes twice as long as the two products it consists of. Query heads that
    share keys are rows of one product.
    """
    cache[0].index_copy_(2, place, key.unsqueeze(2))
    cache[1].index_copy_(2, place, value.unsqueeze(2))
    keys, values = cache.flatten(1, 2)
    grouped = (query * scale).reshape(len(keys), -1, query.shape[-1])
    scores = torch.bmm(grouped, keys.transpose(1, 2)).unflatten(0, cache.shape[1:3]).add_(allowed)
    return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), values).reshape(len(query), -1)


_Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries [N, H, d], keys and values [N, G, d], which it keeps, and the scale of their products, to what is read
[N, H d]."""
_Stack = tuple[Any, list[_Packed]]
"""A decoder, and its layers as they decode."""
