"""On a real GPU: the same as on the CPU, and the same by the fast ways as by the plain ones. `ppo_core` alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import EOS, MODES, PAD, PROMPTS, config, same_figures, trainer, trainer_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppo_core.config import SamplingConfig
from ppo_core.decoder import Stack, frozen, load_causal_lm
from ppo_core.law import SamplingLaw
from ppo_core.logprobs import token_logprobs
from ppo_core.sampling import Sampler, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("trainable", "critic", "warmup"), [*((*mode, 0) for mode in MODES), ("full", "separate", 1)])
def test_training_comes_to_the_same(
    policy_folder: Path, monkeypatch: pytest.MonkeyPatch, trainable: str, critic: str, warmup: int
) -> None:
    """In float32. Sums in another order move a figure a little; the first iteration's samples must be the same."""
    settings = config(trainable, critic, critic_warmup=warmup)
    there = trainer(policy_folder, settings)
    assert there.model.device.type == "cuda"
    found = [there.step() for _ in range(2)]
    monkeypatch.setattr("ppo_core.decoder.device", lambda: torch.device("cpu"))
    here = trainer(policy_folder, settings)
    same_figures([here.step() for _ in range(2)], found, within=1e-2)


def test_in_bfloat16_the_first_step_finds_the_probabilities_that_were_sampled_with(policy_folder: Path) -> None:
    settings = config("full", "separate", learning_rate=1e-9, epochs=1, minibatches=1)
    figures = trainer_of(load_causal_lm(policy_folder, torch.bfloat16), settings).step()
    assert abs(figures["ratio"] - 1) < 0.02
    assert figures["approx_kl"] < 1e-3
    assert 0 < figures["grad_norm"] < float("inf")


def test_what_replayed_graphs_sample_has_the_probabilities_of_a_whole_pass(policy_folder: Path) -> None:
    """Long enough that the cache grows and rows leave: each time a graph ends, and the next begins."""
    model = load_causal_lm(policy_folder, torch.float32)
    sampler = Sampler(None, Stack(model.get_decoder()))
    assert sampler.obstacle is None
    # A token in ten ends a response.
    stops = SamplingLaw(SamplingConfig(max_new_tokens=150), [EOS, *range(0, 120, 10)])
    samples = sample(sampler, model.lm_head, PROMPTS * 8, stops, range(8 * len(PROMPTS)), PAD)
    sequences = samples.sequences
    assert sequences.mask.sum(dim=1).unique().numel() > 5
    positions = (sequences.attention.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(sequences.tokens, attention_mask=sequences.attention.long(), position_ids=positions).logits
    expected = token_logprobs(whole[:, sequences.prompt_length - 1 : -1], sequences.responses)
    torch.testing.assert_close(samples.logprobs[sequences.mask], expected[sequences.mask], rtol=1e-3, atol=1e-3)


def test_packed_layers_in_bfloat16_are_transformers_own_in_float32(policy_folder: Path) -> None:
    """Flash attention over texts of unequal length, and torch's kernels for norms: outputs and gradients."""
    fast = frozen(AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.bfloat16)).requires_grad_(True)
    oracle = frozen(AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.bfloat16)).float()
    oracle.requires_grad_(True)
    tokens = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(1)).cuda()
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[0, :25], attention[1, 30:] = False, False
    found, expected = Stack(fast.get_decoder())(tokens, attention), Stack(oracle.get_decoder()).plain(tokens, attention)
    assert _distance(found[attention], expected[attention]) < 0.02
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).cuda()
    (found.float() * weight)[attention].sum().backward()
    (expected * weight)[attention].sum().backward()
    for (name, one), other in zip(fast.named_parameters(), oracle.parameters(), strict=True):
        if other.grad is not None:
            assert _distance(one.grad, other.grad) < 0.05, name


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of all numbers together: bfloat16 keeps 8 bits."""
    return float((found.float() - expected).norm().detach() / expected.norm().detach())
