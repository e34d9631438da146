"""Policy, reference and critic: what is equal before anything was learnt, and what never moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import plain_model, raw_model, tiny_model
from runs import MODES, PROMPTS, config, digest, draw, law, trainer_of
from torch import Tensor

from ppo_core.config import PPOConfig, SamplingConfig
from ppo_core.models import ActorCritic
from ppo_core.types import Sequences
from ppo_core.weights import install

KINDS = [("Llama", kind) for kind in ("top_layers", "lora", "full")] + [("GPT2", kind) for kind in ("lora", "full")]
# Where samples come from and who values them are independent: each of both is in here with every kind.
MODES_AND_LAWS = [(*mode, {} if mode[1] == "shared" else {"top_k": 20, "top_p": 0.8}) for mode in MODES]
STILL = {"learning_rate": 1e-30, "critic_learning_rate": 1e-30}


def with_model(settings: PPOConfig, **changes: Any) -> PPOConfig:
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


def policy_logprobs(model: ActorCritic, sequences: Sequences, sampling: SamplingConfig) -> Tensor:
    with torch.no_grad():
        return model.evaluate(model.activations(sequences), sequences, law(sampling)).logprobs[sequences.mask]


@pytest.mark.parametrize(("trainable", "critic", "sampling"), MODES_AND_LAWS)
def test_without_learning_nothing_moves(trainable: str, critic: str, sampling: dict[str, float]):
    t = trainer_of(tiny_model("Llama"), config(trainable, critic, sampling=sampling, **STILL))
    stats = t.step()
    assert stats["ratio"] == pytest.approx(1, abs=1e-4)
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["clip_fraction"] == 0
    assert stats["kl"] == pytest.approx(0, abs=1e-5)  # policy and reference are still the same


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("Llama", {"attention_dropout": 0.5}),
        ("GPT2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("OPT", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ],
)
@pytest.mark.parametrize(("trainable", "checkpointing"), [("lora", False), ("full", True)])
def test_dropout_in_the_configuration_is_switched_off(family: str, dropout: dict, trainable: str, checkpointing: bool):
    model = raw_model(family, **dropout)  # in training mode, as nobody should hand it over
    t = trainer_of(model, with_model(config(trainable, **STILL), gradient_checkpointing=checkpointing))
    stats = t.step()
    assert (stats["ratio"], stats["ratio_max"]) == pytest.approx((1, 1), abs=1e-4)
    assert stats["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("trainable", "critic", "sampling"), MODES_AND_LAWS)
def test_training_moves_the_policy_and_never_the_reference(trainable: str, critic: str, sampling: dict[str, float]):
    t = trainer_of(tiny_model("Llama"), config(trainable, critic, sampling=sampling))
    model = t.model
    frozen = digest(model.reference_model), digest(model.reference)
    assert frozen[0] == digest(plain_model("Llama"))
    before = {name: p.detach().clone() for name, p in model.policy_weights().items()}
    rollout = t.roll_out()
    first = t.step()["kl"]
    t.step()
    assert (digest(model.reference_model), digest(model.reference)) == frozen
    assert all(not torch.equal(before[name], p) for name, p in model.policy_weights().items())
    assert first == pytest.approx(0, abs=1e-5)
    sequences, sampled_by = rollout.sequences, t.law
    again = model.reference_logprobs(model.activations(sequences), sequences, sampled_by)
    torch.testing.assert_close(again[sequences.mask], rollout.ref_logprobs[sequences.mask], atol=1e-5, rtol=0)
    with torch.no_grad():
        now = model.evaluate(model.activations(sequences), sequences, sampled_by).logprobs
    assert (now - again)[sequences.mask].abs().max() > 1e-3


def test_all_epochs_learn_from_the_same_targets():
    t = trainer_of(tiny_model("Llama"), config())
    experience = t.estimate(t.roll_out())
    rollout = experience.rollout
    tensors = rollout.logprobs, rollout.values, rollout.ref_logprobs, experience.advantages, experience.returns
    kept = [x.clone() for x in tensors]
    assert not any(x.requires_grad for x in tensors)
    t.optimiser.update(experience, seed=0, iteration=0, kl_coef=0.05)
    assert all(torch.equal(old, new) for old, new in zip(kept, tensors, strict=True))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("family", "trainable"), KINDS)
def test_trained_weights_make_a_plain_model_the_policy(family: str, trainable: str):
    t = trainer_of(tiny_model(family), config(trainable))
    t.step()
    plain = tiny_model(family)
    install(plain, t.model.trained_weights())
    sequences = draw(t.model, PROMPTS[:1]).sequences
    with torch.no_grad():
        logits = plain(sequences.tokens).logits[:, sequences.prompt_length - 1 : -1]
        before = plain_model(family)(sequences.tokens).logits[:, sequences.prompt_length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, sequences.responses.unsqueeze(-1)).squeeze(-1)
    found = policy_logprobs(t.model, sequences, SamplingConfig())
    torch.testing.assert_close(found, expected[sequences.mask], atol=1e-5, rtol=0)
    assert (logits - before).abs().max() > 1e-3
    # What samples is the same network.
    positions = torch.arange(sequences.tokens.shape[1]).unsqueeze(0)
    hidden = t.model.sampler.start().step(sequences.tokens, sequences.attention, positions)[-1]
    sampled = t.model.policy_head(hidden)[:, sequences.prompt_length - 1 : -1]
    torch.testing.assert_close(sampled.detach(), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTJ"])  # with an output layer of its own, tied, with a bias
def test_full_training_is_of_every_weight(family: str):
    model = ActorCritic(tiny_model(family), config("full").model)
    assert set(model.policy_weights()) == {name for name, _ in plain_model(family).named_parameters()}


def test_top_layers_are_the_last_ones_and_the_norm():
    model = ActorCritic(tiny_model("Llama"), config("top_layers").model)
    names = {name for name, _ in plain_model("Llama").named_parameters()}
    top = ("model.layers.2.", "model.layers.3.", "model.norm.")
    assert set(model.policy_weights()) == {name for name in names if name.startswith(top)}


def test_weights_of_another_model_are_refused():
    with pytest.raises(KeyError, match=r"model\.layers\.9"):
        install(tiny_model("Llama"), {"model.layers.9.mlp.up_proj.weight": torch.zeros(48, 32)})


@pytest.mark.parametrize("trainable", ["top_layers", "lora", "full"])
def test_bfloat16_starts_at_ratio_1(trainable: str):
    ratios = {}
    for micro_batch in (1, 2):
        settings = with_model(config(trainable, micro_batch=micro_batch, **STILL), dtype="bfloat16")
        stats = trainer_of(tiny_model("Llama").to(torch.bfloat16), settings).step()
        assert stats["kl"] == 0  # scored by the same arithmetic as the reference
        ratios[micro_batch] = stats["ratio"], stats["ratio_max"]
    assert ratios[1] == pytest.approx((1, 1), abs=1e-6)
    # In micro-batches of other neighbours other kernels round: docs/algorithm.md.
    assert ratios[2] == pytest.approx((1, 1), abs=0.1)
    assert ratios[2][0] == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("trainable", ["top_layers", "lora", "full"])
def test_bfloat16_keeps_float32_masters(trainable: str):
    settings = with_model(config(trainable, "separate"), dtype="bfloat16")
    t = trainer_of(tiny_model("Llama").to(torch.bfloat16), settings)
    t.step()
    weights = t.optimiser.weights
    assert all(m.dtype == torch.float32 for m in weights.masters)
    assert any(w.dtype == torch.bfloat16 for w in weights.working)
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(weights.working, weights.masters, strict=True))
    # Steps smaller than bfloat16 resolves are not lost.
    assert any(not torch.equal(m, m.bfloat16().float()) for m in weights.masters)
