"""Masked statistics against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ppo_core.masking import masked_mean, masked_var, masked_whiten

NAN = math.nan
X = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_and_variance_of_what_counts():
    # 1, 2, 3: mean 2, population variance 2/3 (the sample variance would be 1).
    assert masked_mean(X, MASK).item() == pytest.approx(2)
    assert masked_var(X, MASK).item() == pytest.approx(2 / 3)
    torch.testing.assert_close(masked_mean(X, MASK, dim=1), torch.tensor([1.5, 3.0]))


def test_nothing_counted_is_zero():
    none = torch.zeros_like(MASK)
    assert masked_mean(X, none).item() == 0
    assert masked_var(X, none).item() == 0
    torch.testing.assert_close(masked_mean(X, none, dim=1), torch.zeros(2))


def test_whitening_centres_or_keeps_the_mean():
    scale = 1 / math.sqrt(2 / 3 + 1e-8)
    torch.testing.assert_close(masked_whiten(X, MASK), torch.tensor([[-scale, 0, 0], [scale, 0, 0]]))
    kept = torch.tensor([[2 - scale, 2, 0], [2 + scale, 0, 0]])
    torch.testing.assert_close(masked_whiten(X, MASK, shift_mean=False), kept)


def test_masked_nan_has_no_gradient():
    x = X.clone().requires_grad_()
    (masked_whiten(x, MASK) * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[False, True]]), torch.tensor([[True, False, True]]), torch.tensor([[1, 0]])],
    ids=["starts late", "has a hole", "not boolean"],
)
def test_a_mask_that_is_no_prefix_is_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match="mask"):
        masked_mean(torch.zeros(mask.shape), mask)
