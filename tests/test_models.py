"""Policy, reference and critic on a tiny Llama: what must be equal, and what must not move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import MODES, PAD, PROMPTS, config, draw, law, length_reward, trainer
from transformers import AutoModelForCausalLM

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.decoder import load_causal_lm, without_dropout
from ppo_core.logprobs import token_logprobs
from ppo_core.models import ActorCritic
from ppo_core.trainer import Trainer


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_sampled_logprobs_are_those_of_a_plain_forward(policy_folder: Path, trainable: str, critic: str):
    model = trainer(policy_folder, config(trainable, critic)).model
    samples = draw(model, PROMPTS, temperature=0.7)
    sequences = samples.sequences
    with torch.no_grad():
        now = model.evaluate(model.activations(sequences), sequences, law(SamplingConfig(temperature=0.7)))
    torch.testing.assert_close(now.logprobs[sequences.mask], samples.logprobs[sequences.mask], atol=1e-5, rtol=0)
    # The independent oracle: transformers itself, each row alone, without padding.
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    for row, prompt in enumerate(PROMPTS):
        tokens = sequences.tokens[row][sequences.attention[row]]
        with torch.no_grad():
            logits = plain(tokens.unsqueeze(0)).logits[:, len(prompt) - 1 : -1]
        expected = token_logprobs(logits, tokens[len(prompt) :].unsqueeze(0), 0.7)[0]
        torch.testing.assert_close(now.logprobs[row][sequences.mask[row]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_without_learning_nothing_moves(policy_folder: Path, trainable: str, critic: str):
    t = trainer(policy_folder, config(trainable, critic, learning_rate=1e-30, critic_learning_rate=1e-30))
    stats = t.step()
    assert stats["ratio"] == pytest.approx(1, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["clip_fraction"] == 0
    assert stats["kl"] == pytest.approx(0, abs=1e-4)  # policy and reference are still the same


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_training_moves_the_policy_and_never_the_reference(policy_folder: Path, trainable: str, critic: str):
    t = trainer(policy_folder, config(trainable, critic))
    model = t.model
    reference = {name: p.clone() for name, p in model.reference_model.named_parameters()}
    before = {name: p.clone() for name, p in model.policy_weights().items()}
    experience = t.estimate(t.roll_out())
    kept = experience.rollout.logprobs.clone(), experience.advantages.clone(), experience.returns.clone()
    t.optimiser.update(experience, seed=0, iteration=0, kl_coef=0.05)
    now = experience.rollout.logprobs, experience.advantages, experience.returns
    for old, new in zip(kept, now, strict=True):
        assert torch.equal(old, new)  # all epochs learn from the same targets
    for name, p in model.reference_model.named_parameters():
        assert torch.equal(reference[name], p), name
    assert all(not torch.equal(before[name], p) for name, p in model.policy_weights().items() if "embed" not in name)
    sequences = experience.rollout.sequences
    with torch.no_grad():
        law = model.evaluate(model.activations(sequences), sequences, t.law).logprobs
    assert not torch.allclose(law, experience.rollout.ref_logprobs, atol=1e-4)


@pytest.mark.parametrize("trainable", ["top_layers", "full"])
def test_trained_weights_are_named_as_in_transformers(policy_folder: Path, trainable: str):
    t = trainer(policy_folder, config(trainable))
    t.step()
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    result = plain.load_state_dict({k: p.detach() for k, p in t.model.policy_weights().items()}, strict=False)
    assert not result.unexpected_keys
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = plain(tokens).logits
        ours = t.model.policy_head(t.model.sampler(input_ids=tokens).last_hidden_state)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_dropout_in_the_configuration_is_switched_off(policy_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32, attention_dropout=0.5)
    model.train()
    settings = config(learning_rate=1e-30, critic_learning_rate=1e-30)
    t = Trainer(
        ActorCritic(without_dropout(model), settings.model),
        length_reward,
        PROMPTS,
        settings,
        seed=1,
        law=law(settings.sampling),
        pad=2,
    )
    assert t.step()["ratio"] == pytest.approx(1, abs=1e-4)


def test_bfloat16_keeps_float32_masters(policy_folder: Path):
    settings = config().model_copy(update={"model": ModelConfig(top_layers=2, dtype="bfloat16")})
    model = ActorCritic(load_causal_lm(policy_folder, torch.bfloat16), settings.model)
    t = Trainer(model, length_reward, PROMPTS, settings, seed=1, law=law(settings.sampling), pad=PAD)
    stats = t.step()
    assert stats["kl"] == 0  # scored by the same arithmetic as the reference
    assert all(m.dtype == torch.float32 for m in t.optimiser.weights.masters)
    weights = zip(t.optimiser.weights.working, t.optimiser.weights.masters, strict=True)
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in weights)
