"""CUDA graphs: what a GPU is asked to do, recorded once and asked for again in a single call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graph:
    """A function of tensors, recorded. Asked kernel by kernel, a GPU waits for Python most of a token's time.

    The function must do the same whatever the values of its inputs. What it returns lies in the graph's own memory, and
    holds until the next call.
    """

    def __init__(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> None:
        """`inputs` are of the shapes and dtypes of all inputs to come."""
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*self.inputs)  # libraries set themselves up on first use, which cannot be recorded
            # Not `torch.cuda.graph`: that empties the allocator's cache each time, and what follows allocates anew.
            self.graph.capture_begin()
            try:
                self.outputs = function(*self.inputs)
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.outputs
