"""Activations computed again in the backward pass: the same gradients, and the memory is really saved."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import config, length_reward, perturb, trainer_of

from ppo_core.trainer import Trainer

KINDS = [
    *(("Llama", kind, critic) for kind in ("top_layers", "lora", "full") for critic in ("shared", "separate")),
    *(("GPT2", kind, "shared") for kind in ("lora", "full")),
]


def run(family: str, trainable: str, critic: str, checkpointing: bool) -> Trainer:
    settings = config(trainable, critic)
    model = settings.model.model_copy(update={"gradient_checkpointing": checkpointing})
    t = trainer_of(tiny_model(family), settings.model_copy(update={"model": model}), reward=length_reward)
    perturb([*t.model.policy_weights().values(), *t.model.critic_weights()])
    return t


def counted(t: Trainer) -> Counter[str]:
    """Counts forwards of the feed-forward part of every layer that is trained, from now on."""
    calls: Counter[str] = Counter()
    stacks = {"policy": t.model.policy, "critic": t.model.critic}
    for owner, stack in stacks.items():
        decoder: Any = None if stack is None else stack.decoder
        for i, layer in enumerate(() if stack is None else getattr(decoder, "layers", getattr(decoder, "h", ()))):
            layer.mlp.register_forward_pre_hook(lambda *_, name=f"{owner} {i}": calls.update([name]))
    return calls


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("family", "trainable", "critic"), KINDS)
def test_gradients_are_the_same_and_layers_run_twice(family: str, trainable: str, critic: str):
    gradients, calls = [], []
    for checkpointing in (False, True):
        t = run(family, trainable, critic, checkpointing)
        experience = t.estimate(t.roll_out())
        counter = counted(t)
        t.optimiser._gather(experience, torch.arange(2), 0.05, "")  # one micro-batch
        gradients.append([m.grad for m in t.optimiser.weights.masters])
        calls.append(counter)
        assert not any(layer.training for layer in t.model.policy.decoder.modules() if hasattr(layer, "mlp"))
    for without, again in zip(*gradients, strict=True):
        assert without.abs().max() > 0
        torch.testing.assert_close(again, without, atol=4e-6, rtol=1e-4)
    layers = (2 if trainable == "top_layers" else 4) * (2 if critic == "separate" else 1)
    # What runs packed does not call the layers at all, and is what the gradients of those that do are compared with.
    assert sorted(calls[0].values()) in ([1] * layers, [])
    assert sorted(calls[1].values()) == [2] * layers
