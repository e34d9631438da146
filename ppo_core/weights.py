"""Putting trained weights into a plain model of transformers.

Needs torch alone: the file travels with saved policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALING = "lora_scaling"
"""Beside low-rank updates: the factor alpha / rank of all of them."""


@torch.no_grad()
def install(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Change `model` in place into the policy that `weights` (`ActorCritic.trained_weights`) describe.

    A tensor under the model's own name takes the place of that one; a pair NAME.lora_A.weight [r, in] and
    NAME.lora_B.weight [out, r] is added to NAME.weight as scaling * B A. Raises KeyError for a name that the model
    does not have.
    """
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name == SCALING or name.endswith(".lora_B.weight"):
            continue
        if not name.endswith(".lora_A.weight"):
            own[name].copy_(tensor)
            continue
        layer = name.removesuffix(".lora_A.weight")
        update = weights[f"{layer}.lora_B.weight"].float() @ tensor.float() * weights[SCALING].float()
        weight = own[f"{layer}.weight"]
        # GPT-2 keeps its linear layers transposed.
        transposed = type(model.get_submodule(layer)).__name__ == "Conv1D"
        weight.copy_(weight.float() + (update.T if transposed else update).to(weight.device))
