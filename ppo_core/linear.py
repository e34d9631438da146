"""Linear maps for decoding, where the same weights meet few tokens again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

Map = Callable[[Tensor], Tensor]


def fixed_linear(weight: Tensor, bias: Tensor | None = None) -> Map:
    """The map of x [.., in] to x W^T + b [.., out], for a weight [out, in] that does not change meanwhile.

    On a CPU the weight is laid out once, in a copy, as oneDNN's kernels read it. Left as it is, each call for a few
    tokens spends as long on rearranging as on the product.
    """
    if not _has_blocked_kernels(weight):
        return partial(linear, weight=weight, bias=bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


def _has_blocked_kernels(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
