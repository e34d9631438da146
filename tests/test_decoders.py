"""Any decoder-only model: what we compute of a family's model is what its own transformers forward says of each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, plain_model, tiny_model
from runs import PROMPTS, padded, perturb

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.errors import ConfigError
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.sampling import sample
from ppo_core.types import Sequences
from ppo_core.weights import install

UNCUT = {"Gemma2", "Gemma3", "Granite", "GPT2", "GPTJ", "OPT", "Bloom", "Falcon"}
"""Families whose layers cannot be shared in part."""
KINDS = [(family, kind) for family in FAMILIES for kind in ("full", "lora", "top_layers")]
POSSIBLE = [(family, kind) for family, kind in KINDS if kind != "top_layers" or family not in UNCUT]
# A sixth of the vocabulary ends a response: lengths differ.
LAW = SamplingLaw(SamplingConfig(max_new_tokens=8, temperature=0.7), range(2, VOCABULARY, 6))


def actor_critic(family: str, kind: str) -> ActorCritic:
    settings = ModelConfig.model_validate({"trainable": kind, "top_layers": 2, "dtype": "float32"})
    return ActorCritic(tiny_model(family), settings)


def alone(model: Any, sequences: Sequences, temperature: float = 0.7) -> list[torch.Tensor]:
    """Log-probabilities of each row's response tokens by transformers' own forward of the row, without padding."""
    found = []
    for tokens, there, mask in zip(sequences.tokens, sequences.attention, sequences.mask, strict=True):
        ids, n = tokens[there], int(mask.sum())
        with torch.no_grad():
            law = (model(ids.unsqueeze(0), use_cache=False).logits[0].double() / temperature).log_softmax(-1)
        found.append(law[-n - 1 : -1].gather(1, ids[-n:].unsqueeze(1)).squeeze(1).float())
    return found


def assert_same(found: torch.Tensor, expected: list[torch.Tensor], mask: torch.Tensor) -> None:
    torch.testing.assert_close(found[mask], torch.cat(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("family", "kind"), POSSIBLE)
def test_policy_and_reference_are_the_models_own_forward(family: str, kind: str):
    model = actor_critic(family, kind)
    perturb(model.policy_weights().values())
    samples = sample(model.sampler, model.policy_head, PROMPTS, LAW, range(len(PROMPTS)), 2)
    sequences = samples.sequences
    assert len(set(sequences.mask.sum(dim=1).tolist())) > 1, "the batch must be ragged"
    policy = tiny_model(family)
    install(policy, model.trained_weights())
    trained, start = alone(policy, sequences), alone(plain_model(family), sequences)
    assert not torch.allclose(torch.cat(trained), torch.cat(start), atol=1e-2)
    assert_same(samples.logprobs, trained, sequences.mask)
    for batch in (sequences, padded(sequences, left=3, right=2)):
        activations = model.activations(batch)
        with torch.no_grad():
            now = model.evaluate(activations, batch, LAW)
        assert_same(now.logprobs, trained, batch.mask)
        assert_same(model.reference_logprobs(activations, batch, LAW), start, batch.mask)


@pytest.mark.parametrize("family", sorted(UNCUT))
def test_a_family_that_cannot_be_cut_is_refused_with_what_to_choose(family: str):
    with pytest.raises(ConfigError, match=r"set ppo\.model\.trainable to lora or full"):
        actor_critic(family, "top_layers")
