"""Linear maps for decoding, where the same weights meet few tokens again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

log = logging.getLogger(__name__)

LinearMap = Callable[[Tensor], Tensor]


def fixed_linear(weight: Tensor, bias: Tensor | None = None) -> LinearMap:
    """The map of x [.., in] to x W^T + b [.., out], for a weight [out, in] that does not change meanwhile.

    On a CPU the weight is laid out once, in a copy, as oneDNN's kernels read it. Left as it is, each call for a few
    tokens spends as long on rearranging as on the product.
    """
    if weight.device.type != "cpu" or not _has_blocked_kernels(weight.dtype):
        return partial(linear, weight=weight, bias=bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


@cache
def _has_blocked_kernels(dtype: torch.dtype) -> bool:
    """Of this CPU; said once in the log."""
    found = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    if found:
        log.info("decoding with weights laid out anew: oneDNN's kernels are then faster with few tokens")
    else:
        log.info("decoding with weights as they are: oneDNN has no kernels for %s on this processor", dtype)
    return found
