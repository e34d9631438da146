"""Whole texts through packed layers, and their gradients, against transformers' own layers and autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model
from torch import Tensor, nn

from ppo_core.config import ModelConfig
from ppo_core.decoder import Stack, split
from ppo_core.models import ActorCritic
from ppo_core.packed import obstacle_to_packing
from ppo_core.precision import MasterWeights

# Where tokens stand: padding on the left, on the right, on both sides, and none.
RAGGED = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
).bool()
LAYOUTS = {"ragged": RAGGED, "equal": torch.ones_like(RAGGED), "alone": RAGGED[1:2]}
SHAPES = {"grouped heads": {}, "each its own": {"num_key_value_heads": 4}, "wide heads": {"head_dim": 16}}


def tokens_of(attention: Tensor) -> Tensor:
    return torch.randint(3, VOCABULARY, attention.shape, generator=torch.Generator().manual_seed(5))


def trained(stack: Stack, x: Tensor, attention: Tensor, way: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What comes out where tokens stand, and the gradients of a loss on it: of x, and of the weights by name."""
    stack.requires_grad_(True).zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    out = way(x, attention)[attention].float()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (weights * out.tanh()).sum().backward()
    found = {name: p.grad.float().to_dense() for name, p in stack.named_parameters() if p.grad is not None}
    return out.detach(), found | ({"x": x.grad[attention].float()} if x.is_floating_point() else {})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("above_a_trunk", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(layout: str, shape: str, above_a_trunk: bool):
    model = tiny_model("Llama", rope_parameters={"rope_theta": 50.0}, **SHAPES[shape])
    for name, parameter in model.named_parameters():
        if "norm" in name:  # 1 everywhere would hide a weight that is left out
            nn.init.normal_(parameter, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    attention = LAYOUTS[layout]
    stack, x = Stack(model.get_decoder()), tokens_of(attention)
    if above_a_trunk:
        trunk, stack = split(model, 2)
        x = trunk(x, attention)
    assert obstacle_to_packing([stack.decoder]) is None
    out, gradients = trained(stack, x, attention, stack)
    expected, plain = trained(stack, x, attention, stack.plain)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (gradient - plain[name]).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_bfloat16_they_are_as_near_to_the_exact_ones_as_those_of_transformers(layout: str):
    attention = LAYOUTS[layout]
    exact, low = (Stack(tiny_model("Llama").to(dtype).get_decoder()) for dtype in (torch.float32, torch.bfloat16))
    for parameter, rounded in zip(exact.parameters(), low.parameters(), strict=True):
        parameter.copy_(rounded)
    x = tokens_of(attention)
    truth, of_truth = trained(exact, x, attention, exact.plain)
    usual, of_usual = trained(low, x, attention, low.plain)
    found, of_found = trained(low, x, attention, low)
    assert 0 < (found - truth).norm() < 1.5 * (usual - truth).norm() < 0.1 * truth.norm()
    whole, plain, packed = (torch.cat([g.flatten() for g in each.values()]) for each in (of_truth, of_usual, of_found))
    assert 0 < (packed - whole).norm() < 1.5 * (plain - whole).norm() < 0.2 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_where_no_token_does_is_not_read(dtype: torch.dtype):
    stack = Stack(tiny_model("Llama").to(dtype).get_decoder())
    tokens = tokens_of(RAGGED)
    other = torch.where(RAGGED, tokens, tokens.flip(1))
    out, gradients = trained(stack, tokens, RAGGED, stack)
    again, same = trained(stack, other, RAGGED, stack)
    assert torch.equal(out, again)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


def test_frozen_weights_get_no_gradient_and_the_others_the_same():
    stack = Stack(tiny_model("Llama").get_decoder())
    x = tokens_of(RAGGED)
    _, everything = trained(stack, x, RAGGED, stack)
    stack.requires_grad_(False).zero_grad()
    for parameter in stack.decoder.layers[1].parameters():
        parameter.requires_grad_(True)
    out = stack(x, RAGGED)[RAGGED]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (weights * out.tanh()).sum().backward()
    for name, parameter in stack.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, everything[name])
        else:
            assert parameter.grad is None


def test_masters_add_up_the_gradients_of_embeddings_that_are_read_and_of_all_else():
    low = Stack(tiny_model("Llama").to(torch.bfloat16).get_decoder())
    masters, expected = MasterWeights(low.parameters()), dict[str, Tensor]()
    for attention in (RAGGED, LAYOUTS["equal"], RAGGED[1:2]):
        alone = Stack(tiny_model("Llama").to(torch.bfloat16).get_decoder())
        for name, gradient in trained(alone, tokens_of(attention), attention, alone)[1].items():
            expected[name] = expected.get(name, torch.zeros(())) + gradient
        out = low(tokens_of(attention), attention)[attention].float()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
        (weights * out.tanh()).sum().backward()
    for (name, _), master in zip(low.named_parameters(), masters.masters, strict=True):
        torch.testing.assert_close(master.grad, expected[name])


def test_lora_and_its_reference_run_alike():
    model = ActorCritic(tiny_model("Llama").to(torch.bfloat16), ModelConfig(trainable="lora", dtype="bfloat16"))
    tokens = tokens_of(RAGGED)
    assert torch.equal(model.policy(tokens, RAGGED), model.reference(tokens, RAGGED))
