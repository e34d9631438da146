"""Linear maps for decoding, where the same weights meet few tokens again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

log = logging.getLogger(__name__)

Map = Callable[[Tensor], Tensor]


def fixed_linear(weight: Tensor, bias: Tensor | None = None) -> Map:
    """The map of x [.., in] to x W^T + b [.., out], for a weight [out, in] that does not change meanwhile.

    On a CPU the weight is laid out once, in a copy, as oneDNN's kernels read it. Left as it is, each call for a few
    tokens spends as long on rearranging as on the product.
    """
    if not _has_blocked_kernels(weight.device.type, weight.dtype):
        return partial(linear, weight=weight, bias=bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


@cache
def _has_blocked_kernels(device: str, dtype: torch.dtype) -> bool:
    """Said once in the log."""
    of_cpu = device == "cpu" and torch.backends.mkldnn.is_available()
    found = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if of_cpu and found:
        log.info("decoding with weights laid out anew: oneDNN's kernels are then faster with few tokens")
    else:
        log.info("decoding with weights as they are: oneDNN has no kernels for %s on this %s", dtype, device)
    return of_cpu and found
