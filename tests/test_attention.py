"""Attention in float32 inside a bfloat16 model: as near to the exact model as bfloat16's own attention, or nearer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model

from ppo_core.attention import NAME
from ppo_core.decoder import prepared

TOKENS = torch.arange(3, 27).view(2, 12)
THERE = torch.ones_like(TOKENS)
THERE[0, :4] = 0


def said(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits, and the gradient of one of its first layer's weights."""
    weight = next(p for name, p in model.named_parameters() if "layers.0" in name and p.dim() == 2)
    weight.requires_grad_()
    logits = model(TOKENS, attention_mask=THERE).logits[:, 4:].float()
    logits.square().mean().backward()
    return logits.detach(), weight.grad.float()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
def test_it_is_the_same_attention(family: str) -> None:
    exact, plain, ours = (tiny_model(family) for _ in range(3))
    plain, ours = plain.to(torch.bfloat16), prepared(ours.to(torch.bfloat16))
    assert [m.config._attn_implementation for m in (exact, plain, ours)] == ["sdpa", "sdpa", NAME]
    for truth, usual, found in zip(said(exact), said(plain), said(ours), strict=True):
        assert 0 < (found - truth).norm() < 1.5 * (usual - truth).norm() < 0.5 * truth.norm()
