"""Float32 masters of weights that compute in bfloat16."""

from __future__ import annotations

import copy

import torch
from toy import toy_config, toy_model, toy_trainer

from ppo_core.precision import MasterWeights
from ppo_core.trainer import Trainer


def gradients(t: Trainer) -> torch.Tensor:
    return torch.cat([torch.zeros(m.numel()) if m.grad is None else m.grad.flatten() for m in masters(t)])


def masters(t: Trainer) -> list[torch.Tensor]:
    return t.optimiser.weights.masters


def slots(t: Trainer) -> dict[int, dict[str, torch.Tensor]]:
    return copy.deepcopy(t.optimiser.adam.state_dict()["state"])


def test_bfloat16_arithmetic_has_float32_masters():
    # Four steps of 3e-4 are lost in a bfloat16 weight of 1, whose neighbours are 1/256 or more away; masters add up.
    small = {"learning_rate": 3e-4, "critic_learning_rate": 3e-4}
    t = toy_trainer(toy_config(model={"dtype": "bfloat16"}, update=small), model=toy_model(dtype=torch.bfloat16))
    norm = next(i for i, name in enumerate(t.model.policy_weights()) if name.endswith("norm.weight"))
    first = masters(t)[norm].clone()
    t.step()
    assert all(m.dtype == torch.float32 for m in masters(t))
    assert (masters(t)[norm] - first).abs().max() > 1e-4
    assert torch.equal(t.optimiser.weights.working[norm].float(), first)
    for _ in range(8):
        t.step()
    assert not torch.equal(t.optimiser.weights.working[norm].float(), first)
    for working, master in zip(t.optimiser.weights.working, masters(t), strict=True):
        assert torch.equal(working, master.to(working.dtype))


def test_micro_batches_add_up_in_float32():
    # 1 and 256 times 2^-9 are 1.5; added one by one in bfloat16 each is lost: 1 + 2^-9 is 1 there.
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weights = MasterWeights([weight])
    for part in [1.0] + [2.0**-9] * 256:
        (weight * part).sum().backward()
        assert weight.grad is None
    assert weights.masters[0].grad.item() == 1.5


def test_masters_that_are_released_leave_the_weights_to_others():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterWeights([weight]).release()
    assert not weight.requires_grad
    second = MasterWeights([weight])
    (weight * 2).sum().backward()
    assert second.masters[0].grad.item() == 2.0
