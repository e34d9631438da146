"""A row alone is the same row in a batch: log-probabilities, values, scores and the gradient of every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import VOCABULARY, tiny_model
from runs import MODES, PROMPTS, length_reward, padded, perturb
from torch import Tensor

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.decoder import clone, split
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.rollout import ModelReward, score, score_all
from ppo_core.sampling import sample
from ppo_core.scorers import RewardModel, score_texts
from ppo_core.types import Samples, Sequences

LAW = SamplingLaw(SamplingConfig(max_new_tokens=8, temperature=0.7, top_p=0.9), range(2, VOCABULARY, 6))
FAMILY_MODES = [
    *(("Llama", *mode) for mode in MODES),
    *((family, kind, "shared") for family in ("GPT2", "Bloom", "Mistral") for kind in ("lora", "full")),
]


def actor_critic(family: str, trainable: str, critic: str) -> ActorCritic:
    settings = {"trainable": trainable, "critic": critic, "critic_start": "policy", "top_layers": 2, "dtype": "float32"}
    model = ActorCritic(tiny_model(family), ModelConfig.model_validate(settings))
    # An adapter that starts at zero has a gradient in one half alone, and a head of zeros gives the layers none.
    perturb([*model.policy_weights().values(), *model.critic_weights()])
    return model


def draw(model: ActorCritic) -> Samples:
    samples = sample(model.sampler, model.policy_head, PROMPTS, LAW, range(len(PROMPTS)), 2)
    assert len(set(samples.sequences.mask.sum(dim=1).tolist())) > 1
    return samples


def gradients(model: ActorCritic, sequences: Sequences, weights: Tensor) -> list[Tensor]:
    """Of a weighted sum of all that the networks say of the tokens; `weights` [B, R] are 0 where nothing counts."""
    parameters = [*model.policy_weights().values(), *model.critic_weights()]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    now = model.evaluate(model.activations(sequences), sequences, LAW)
    terms = now.logprobs + 0.7 * now.values - 0.3 * now.entropy
    torch.where(weights == 0, 0.0, terms * weights).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@pytest.mark.parametrize(("family", "trainable", "critic"), FAMILY_MODES)
def test_gradients_of_a_row_alone_are_those_in_a_padded_batch(family: str, trainable: str, critic: str):
    model = actor_critic(family, trainable, critic)
    samples = draw(model)
    batch = padded(samples.sequences, left=2, right=3)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    total = [torch.zeros_like(g) for g in gradients(model, batch, weights)]
    for row in range(len(PROMPTS)):
        only = torch.arange(len(PROMPTS)).unsqueeze(1) == row
        together = gradients(model, batch, weights * only)
        single = samples.rows(torch.tensor([row])).sequences
        assert single.attention.all()
        alone = gradients(model, single, weights[row : row + 1, : single.responses.shape[1]])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b, a, atol=5e-5, rtol=1e-4)
        total = [t + g for t, g in zip(total, alone, strict=True)]
    assert all(g.abs().max() > 0 for g in total), "a parameter without a gradient proves nothing"
    for a, b in zip(total, gradients(model, batch, weights), strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_a_rollout_does_not_depend_on_its_micro_batches(trainable: str, critic: str):
    model = actor_critic("Llama", trainable, critic)
    samples = draw(model)
    singles = [score(model, length_reward, samples.rows(torch.tensor([row])), LAW) for row in range(len(PROMPTS))]
    sequences = padded(samples.sequences, left=2, right=3)
    # What the trunk said while sampling has the old width: it says it again.
    wide = replace(
        samples, sequences=sequences, logprobs=torch.nn.functional.pad(samples.logprobs, (0, 3)), activations=None
    )
    for some, size in ((samples, 1), (samples, 3), (samples, 4), (wide, 2)):
        whole = score_all(model, length_reward, some, LAW, size)
        assert torch.equal(whole.scores, torch.cat([single.scores for single in singles]))
        for name in ("logprobs", "ref_logprobs", "values", "entropy"):
            for row, single in enumerate(singles):
                found, n = getattr(whole, name)[row], single.mask.shape[1]
                torch.testing.assert_close(found[:n], getattr(single, name)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("own_layers", [1, 2, 3])
def test_a_score_does_not_depend_on_the_batch_nor_on_eos(own_layers: int):
    base = tiny_model("Llama")
    trunk, top = split(base, own_layers)
    scorer = RewardModel(trunk, clone(top), 32, pad=0)
    perturb(scorer.parameters())
    scorer.head.calibrate(torch.tensor([1.0, 3.0]))
    policy = ActorCritic(base, ModelConfig(top_layers=2, dtype="float32"))
    samples = draw(policy)
    wide = padded(samples.sequences, left=2, right=3)
    # Among these samples are responses that stopped and one that was cut.
    assert samples.ended.any()
    assert not samples.ended.all()
    rows = zip(wide.tokens, wide.attention, samples.ended.tolist(), strict=True)
    texts = [tokens[there].tolist()[: -1 if ended else None] for tokens, there, ended in rows]
    expected = torch.stack([(scorer.raw([text])[0].detach() - 2) / 1 for text in texts])
    for some in (samples, replace(samples, sequences=wide)):
        found = ModelReward(scorer, policy)(some, policy.activations(some.sequences))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(score_texts(scorer, texts), expected, atol=1e-5, rtol=0)


def test_gradients_of_scores_do_not_depend_on_the_batch():
    trunk, top = split(tiny_model("Llama"), 2)
    scorer = RewardModel(trunk, clone(top).requires_grad_(True), 32, pad=0)
    perturb(scorer.parameters())
    texts, weights = [[1, 5, 6, 7, 8, 9], [1, 50], [1, 60, 61]], torch.tensor([1.0, -2.0, 0.5])
    found = torch.autograd.grad((scorer.raw(texts) * weights).sum(), scorer.trained())
    alone = [
        torch.autograd.grad(w * scorer.raw([t]).sum(), scorer.trained()) for t, w in zip(texts, weights, strict=True)
    ]
    for gradient, *parts in zip(found, *alone, strict=True):
        torch.testing.assert_close(gradient, sum(parts), atol=1e-5, rtol=1e-4)
