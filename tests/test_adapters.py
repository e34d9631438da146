"""Adapters: a policy that starts from one of supervised fine-tuning, and what may be adapted."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from families import tiny_model
from runs import PROMPTS, config, draw, law, perturb, trainer_of

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.errors import ConfigError
from ppo_core.models import ActorCritic
from ppo_core.types import Samples
from ppo_core.weights import install

ROW = torch.tensor([PROMPTS[3]])
KINDS = [("Llama", kind) for kind in ("full", "lora", "top_layers")] + [("GPT2", kind) for kind in ("full", "lora")]


def fine_tuned(family: str, how: str) -> Any:
    """A model with an adapter that matters, as peft or as transformers itself carries one."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny_model(family)
    torch.manual_seed(0)
    if how == "peft":
        model = peft.get_peft_model(model, settings)
    else:
        model.add_adapter(settings)
    perturb([p for name, p in model.named_parameters() if "lora_" in name], scale=0.1)
    return model.eval()


def settings(kind: str) -> ModelConfig:
    return ModelConfig.model_validate({"trainable": kind, "top_layers": 2, "dtype": "float32"})


def says(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ROW, use_cache=False).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("how", ["peft", "transformers"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_reference_is_the_base_with_its_adapter_of_fine_tuning(family: str, kind: str, how: str):
    expected, base = says(fine_tuned(family, how)), says(tiny_model(family))
    assert not torch.allclose(expected, base, atol=0.05)
    t = trainer_of(fine_tuned(family, how), config(kind))
    torch.testing.assert_close(says(t.model.reference_model), expected, atol=1e-4, rtol=0)
    assert t.step()["kl"] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(says(t.model.reference_model), expected, atol=1e-4, rtol=0)
    policy = tiny_model(family)
    policy.load_state_dict(t.model.reference_model.state_dict())
    install(policy, t.model.trained_weights())  # under the names of a model that never had an adapter
    samples = draw(t.model, PROMPTS)
    assert (policy_logprobs(t.model, samples) - reference_logprobs(t.model, samples)).abs().max() > 1e-3


def policy_logprobs(model: ActorCritic, samples: Samples) -> torch.Tensor:
    sequences = samples.sequences
    with torch.no_grad():
        return model.evaluate(model.activations(sequences), sequences, law(SamplingConfig())).logprobs[sequences.mask]


def reference_logprobs(model: ActorCritic, samples: Samples) -> torch.Tensor:
    sequences = samples.sequences
    activations = model.activations(sequences)
    return model.reference_logprobs(activations, sequences, law(SamplingConfig()))[sequences.mask]


def test_a_new_adapter_changes_nothing_and_shares_all_else():
    base = tiny_model("Llama")
    model = ActorCritic(base, settings("lora"))
    samples = draw(model, PROMPTS)
    assert torch.equal(policy_logprobs(model, samples), reference_logprobs(model, samples))
    assert not any("lora" in name for name, _ in base.named_parameters())
    of_base = {p.data_ptr() for p in base.parameters()}
    adapters = {p.data_ptr() for p in model.policy_weights().values()}
    assert {p.data_ptr() for p in model.policy.parameters()} - adapters <= of_base
    assert not adapters & of_base
    # Every linear layer of the decoder: 4 layers of 7.
    assert len(adapters) == 4 * 7 * 2


def test_adapters_are_drawn_with_the_seed_alone():
    models = [ActorCritic(tiny_model("Llama"), settings("lora"), seed=seed) for seed in (1, 1, 2)]
    first, same, other = ([p for n, p in m.policy_weights().items() if "lora_A" in n] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("names", [("nonsense",), ("embed_tokens",)])
def test_target_modules_that_cannot_be_adapted_are_refused(names: tuple[str, ...]):
    kind = ModelConfig.model_validate({"trainable": "lora", "lora": {"target_modules": names}, "dtype": "float32"})
    with pytest.raises(ConfigError, match=r"ppo\.model\.lora\.target_modules"):
        ActorCritic(tiny_model("Llama"), kind)


def test_only_the_modules_named_are_adapted():
    kind = ModelConfig.model_validate(
        {"trainable": "lora", "lora": {"target_modules": ["q_proj", "v_proj"], "rank": 3}, "dtype": "float32"}
    )
    weights = ActorCritic(tiny_model("Llama"), kind).policy_weights()
    assert len(weights) == 4 * 2 * 2
    assert all("q_proj.lora_" in name or "v_proj.lora_" in name for name in weights)
    assert all(3 in p.shape for p in weights.values())
