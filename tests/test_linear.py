"""Linear maps laid out for decoding against the plain product, computed in float64."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from ppo_core.decoder import LMHead
from ppo_core.linear import fixed_linear


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (33, 40), (5, 1, 40)])
def test_it_is_the_product(shape: tuple[int, ...], dtype: torch.dtype, biased: bool):
    draw = torch.Generator().manual_seed(5)
    x, weight, bias = (torch.randn(*size, generator=draw).to(dtype) for size in (shape, (70, 40), (70,)))
    found = fixed_linear(weight, bias if biased else None)(x)
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    assert found.dtype == dtype
    # Sums of 40 products of about 1 are about 6, in float32 at least while they are added.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=32 * torch.finfo(torch.float32).eps + eps, rtol=eps)


def test_a_new_map_has_the_weight_as_it_is_then():
    weight, x = torch.nn.Parameter(torch.eye(32)), torch.ones(2, 32)
    torch.testing.assert_close(fixed_linear(weight)(x), x)
    with torch.no_grad():
        weight.mul_(3)
    torch.testing.assert_close(fixed_linear(weight)(x), 3 * x)


@pytest.mark.parametrize("family", ["Llama", "Cohere", "Gemma2", "Phi", "GPTJ"])
def test_an_output_layer_keeps_its_scale_cap_and_bias(family: str):
    head = LMHead(tiny_model(family))
    hidden = torch.randn(4, head.linear.in_features, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head.fixed()(hidden), head(hidden))
