"""What the machine could do at best: the products of an update alone, and reading memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ppo_core.device import clock, device

Product = tuple[int, int, int]


def products(config: Any, tokens: int, counted: int, layers: int, head: bool, head_trained: bool) -> list[Product]:
    """The matrix products (m, k, n) of one forward and backward pass through the trained layers of a Llama.

    `tokens` pass through the layers, `counted` through the output layer, whose weights may be frozen.
    """
    width, inner = config.hidden_size, config.intermediate_size
    read = width * config.num_key_value_heads // config.num_attention_heads
    linear = [
        (width, width),
        (width, read),
        (width, read),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    found = []
    for k, n in linear * layers:
        found += [(tokens, k, n), (tokens, n, k), (n, tokens, k)]  # forward, of the input, of the weight
    if head:
        found += [(counted, width, config.vocab_size), (counted, config.vocab_size, width)]
        found += [(config.vocab_size, counted, width)] if head_trained else []
    return found


def seconds_of(wanted: list[Product], dtype: torch.dtype) -> float:
    """How long these products take with nothing between them, by the median time of each shape."""
    return sum(wanted.count(shape) * _median(_product(shape, dtype)) for shape in set(wanted))


def read_bandwidth() -> float:
    """Bytes a second when summing an array far larger than the caches."""
    array = torch.ones(1 << 28, device=device())
    return array.nbytes / _median(array.sum)


def _product(shape: Product, dtype: torch.dtype) -> Callable[[], object]:
    m, k, n = shape
    left, right = (torch.randn(*shape, device=device()).to(dtype) for shape in ((m, k), (n, k)))
    return lambda: torch.nn.functional.linear(left, right)


def _median(do: Callable[[], object], times: int = 9) -> float:
    do()
    taken = []
    for _ in range(times):
        start = clock()
        do()
        taken.append(clock() - start)
    return sorted(taken)[times // 2]
