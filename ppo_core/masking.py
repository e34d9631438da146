"""Statistics over the positions that count.

Shapes: B batch, R response position. A mask is boolean, True = counts, and a row's Trues are a prefix: a response
starts at its first position and ends once. What lies where the mask is False may be anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


def check_mask(mask: Tensor) -> Tensor:
    """Return `mask` [..., R], or raise ValueError if it is not boolean or a row's Trues are not a prefix."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, must be torch.bool with True = counts")
    if mask.shape[-1] > 1 and bool((mask[..., 1:] & ~mask[..., :-1]).any()):
        raise ValueError("mask has a row whose Trues are not a prefix; a response starts at position 0 and ends once")
    return mask


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask, of the same shape, is True; 0 elsewhere. Selects, because NaN x 0 is NaN."""
    if mask.shape != x.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, must be {tuple(x.shape)} like what it masks")
    return torch.where(check_mask(mask), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the positions that count, of all or along `dim`; 0 where nothing counts."""
    total = counted(x, mask)
    if dim is None:
        return total.sum() / mask.sum().clamp(min=1)
    return total.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n) of `x` over the positions that count."""
    return masked_mean((counted(x, mask) - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` to mean 0 and variance 1 over the positions that count; 0 elsewhere.

    (x - mean) / sqrt(var + 1e-8). `shift_mean=False` adds the mean back, as reward whitening wants.
    """
    x = counted(x, mask)  # before any product: in the backward pass, too, NaN x 0 is NaN
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + WHITEN_EPSILON)
    return counted(whitened if shift_mean else whitened + mean, mask)
