"""What no mask counts changes nothing, neither a result nor a gradient; and what else leaves the mathematics alone."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ppo_core.advantages import gae
from ppo_core.diagnostics import explained_variance
from ppo_core.kl import kl_estimate
from ppo_core.losses import denominators, kl_loss, mean_loss, policy_loss, preference_loss, value_loss
from ppo_core.masking import masked_mean, masked_var, masked_whiten
from ppo_core.rewards import shape_rewards

SCORES = torch.tensor([3.0, -1.0, 0.5, 9.0], dtype=torch.float64)


def shaped(estimator: str) -> Callable[..., tuple[Tensor, ...]]:
    # A row without any token is scored at its first position, which gae then leaves out.
    return lambda m, x, y, z: (shape_rewards(SCORES[: len(m)], x, y, m, 0.3, estimator, 5.0) * (m.any(dim=1)[:, None]),)


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "masked_mean": lambda m, x, y, z: (masked_mean(x, m),),
    "masked_mean by row": lambda m, x, y, z: (masked_mean(x, m, dim=1),),
    "masked_var": lambda m, x, y, z: (masked_var(x, m),),
    "masked_whiten": lambda m, x, y, z: (masked_whiten(x, m),),
    "masked_whiten, mean kept": lambda m, x, y, z: (masked_whiten(x, m, shift_mean=False),),
    "gae": lambda m, x, y, z: gae(x, y, m, 0.9, 0.8),
    "shape_rewards k1": shaped("k1"),
    "shape_rewards k2": shaped("k2"),
    "shape_rewards k3": shaped("k3"),
    "policy_loss": lambda m, x, y, z: tuple(vars(policy_loss(x, y, z, m, 0.2)).values()),
    "policy_loss, dual clip": lambda m, x, y, z: tuple(vars(policy_loss(x, y, z, m, 0.2, 1.5)).values()),
    "policy_loss, sequences": lambda m, x, y, z: (
        policy_loss(x, y, z, m, 0.2, denominator=denominators(m, "sequences")).loss,
    ),
    "value_loss": lambda m, x, y, z: tuple(vars(value_loss(x, y, z, m, 0.2)).values()),
    "kl_loss k1": lambda m, x, y, z: (kl_loss(x, y, m, "k1"),),
    "kl_loss k2": lambda m, x, y, z: (kl_loss(x, y, m, "k2"),),
    "kl_loss k3": lambda m, x, y, z: (kl_loss(x, y, m, "k3"),),
    "mean_loss": lambda m, x, y, z: (mean_loss(x, m),),
    "explained_variance": lambda m, x, y, z: (explained_variance(x, y, m),),
}

garbage = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
lengths_of_rows = st.lists(st.integers(0, 4), min_size=1, max_size=4)
seeds = st.integers(0, 2**32)


def numbers(seed: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors like `mask`, their values from -3 to 3 in steps of a quarter: equal ones occur, and zeros."""
    drawn = torch.randint(-12, 13, (3, *mask.shape), generator=torch.Generator().manual_seed(seed))
    return (drawn / 4).double().unbind()


def prefix_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def evaluate(name: str, mask: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, with what lies outside the mask left out, and the gradient of their weighted sum for each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = FUNCTIONS[name](mask, *leaves)
    differentiable = [r for r in results if r.requires_grad]
    if differentiable:
        # Weights that do not depend on the width.
        places = [[torch.arange(1.0, n + 1).double() for n in r.shape] for r in differentiable]
        weights = [p[0] if len(p) == 1 else p[0][:, None] * p[1] if p else 1.0 for p in places]
        sum((r * w).sum() for r, w in zip(differentiable, weights, strict=True)).backward()
    return [r.detach() for r in results], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, deadline=None)
@given(lengths_of_rows, st.integers(0, 3), garbage, seeds)
def test_masked_garbage_and_padding_are_inert(name: str, lengths: list[int], more: int, spoilt: float, seed: int):
    mask, wide = prefix_mask(lengths, 4), prefix_mask(lengths, 4 + more)
    inputs = [torch.where(mask, x, 0.0) for x in numbers(seed, mask)]
    dirty = [torch.where(wide, torch.nn.functional.pad(x, (0, more)), spoilt) for x in inputs]
    clean_results, clean_gradients = evaluate(name, mask, inputs)
    results, gradients = evaluate(name, wide, dirty)
    # Sums over rows of another width may be added in another order.
    close = {"rtol": 1e-7, "atol": 1e-9}
    for clean, found in zip(clean_results, results, strict=True):
        if clean.shape != found.shape:  # [B, R]: the same where it was, and 0 behind
            assert (found[:, 4:] == 0).all()
            found = found[:, :4]
        torch.testing.assert_close(found, clean, **close)
    for clean, found in zip(clean_gradients, gradients, strict=True):
        if clean is None or found is None:
            assert clean is found
            continue
        assert (found[~wide] == 0).all()
        torch.testing.assert_close(found[:, :4], clean, **close)


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.floats(-3, 3), seeds)
def test_what_a_common_shift_does_not_change(lengths: list[int], shift: float, seed: int):
    mask = prefix_mask(lengths, 4)
    x, y, z = numbers(seed, mask)
    same = {"rtol": 1e-6, "atol": 1e-6}
    # Only the ratio of two probabilities enters the policy's loss and the KL, only distances the value's.
    for moved, plain in zip(
        vars(policy_loss(x + shift, y + shift, z, mask, 0.2)).values(),
        vars(policy_loss(x, y, z, mask, 0.2)).values(),
        strict=True,
    ):
        torch.testing.assert_close(moved, plain, **same)
    moved_value = value_loss(x + shift, y + shift, z + shift, mask, 0.2)
    torch.testing.assert_close(moved_value.loss, value_loss(x, y, z, mask, 0.2).loss, **same)
    for estimator in ("k1", "k2", "k3"):
        moved = kl_estimate(x + shift, y + shift, estimator)
        torch.testing.assert_close(moved, kl_estimate(x, y, estimator), **same)
    torch.testing.assert_close(preference_loss(x[0] + shift, y[0] + shift), preference_loss(x[0], y[0]), **same)
    torch.testing.assert_close(masked_var(x + shift, mask), masked_var(x, mask), **same)
    if masked_var(x, mask) > 0:
        torch.testing.assert_close(masked_whiten(x + shift, mask), masked_whiten(x, mask), **same)
        kept = masked_whiten(x + shift, mask, shift_mean=False) - masked_whiten(x, mask, shift_mean=False)
        torch.testing.assert_close(kept, shift * mask.double(), **same)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(0, 4), min_size=4, max_size=4), seeds)
def test_the_order_of_responses_changes_nothing(order: list[int], lengths: list[int], seed: int):
    mask = prefix_mask(lengths, 4)
    inputs = numbers(seed, mask)
    for name in ("masked_whiten", "gae", "policy_loss", "value_loss", "kl_loss k3"):
        plain = FUNCTIONS[name](mask, *inputs)
        mixed = FUNCTIONS[name](mask[order], *(x[order] for x in inputs))
        for a, b in zip(plain, mixed, strict=True):
            torch.testing.assert_close(b, a[order] if a.dim() else a, rtol=1e-7, atol=1e-9)
