"""Where a critic starts, and what its training leaves alone."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from runs import PROMPTS, config, digest, draw, law, perturb, trainer_of

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.decoder import clone, split
from ppo_core.errors import ConfigError
from ppo_core.models import ActorCritic
from ppo_core.rollout import ModelReward
from ppo_core.scorers import RewardModel, score_texts
from ppo_core.types import Sequences
from ppo_core.weights import install

KINDS = ("top_layers", "lora", "full")


def reward_model(base, own_layers: int = 2) -> RewardModel:
    """One that has learnt something, over the trunk of `base`."""
    trunk, top = split(base, own_layers)
    scorer = RewardModel(trunk, clone(top), 32, pad=0)
    perturb(scorer.parameters(), scale=0.3)
    scorer.head.calibrate(torch.tensor([0.5, 2.5, 3.0]))
    return scorer.requires_grad_(False)


def settings(trainable: str, start: str, critic: str = "separate") -> ModelConfig:
    return ModelConfig.model_validate(
        {"trainable": trainable, "top_layers": 2, "critic": critic, "critic_start": start, "dtype": "float32"}
    )


def values(model: ActorCritic, sequences: Sequences) -> torch.Tensor:
    with torch.no_grad():
        return model.evaluate(model.activations(sequences), sequences, law(SamplingConfig())).values


@pytest.mark.parametrize(
    ("trainable", "own_layers"), [("top_layers", 2), ("lora", 2), ("full", 2), ("lora", 3), ("full", 1)]
)
def test_a_critic_from_the_reward_model_predicts_the_score_of_the_text_so_far(trainable: str, own_layers: int):
    base = tiny_model("Llama")
    scorer = reward_model(base, own_layers)
    model = ActorCritic(base, settings(trainable, "reward_model"), scorer)
    sequences = draw(model, PROMPTS).sequences
    found = values(model, sequences)
    for row, prompt in enumerate(PROMPTS):
        response = sequences.responses[row][sequences.mask[row]].tolist()
        before = [[*prompt, *response[:t]] for t in range(len(response))]
        expected = torch.cat([score_texts(scorer, [text]) for text in before])
        torch.testing.assert_close(found[row, : len(response)], expected, atol=1e-5, rtol=1e-4)
    assert found[sequences.mask].std() > 0.1


@pytest.mark.parametrize("trainable", KINDS)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_from_the_policy_predicts_nothing_at_first(trainable: str, critic: str):
    model = ActorCritic(tiny_model("Llama"), settings(trainable, "policy", critic))
    assert (values(model, draw(model, PROMPTS).sequences) == 0).all()
    # Behind the head are the policy's own features.
    torch.nn.init.constant_(model.value_head.linear.weight, 1.0)
    sequences = draw(model, PROMPTS[:1]).sequences
    hidden = model.reference_model.get_decoder()(input_ids=sequences.tokens).last_hidden_state
    expected = hidden[:, sequences.prompt_length - 1 : -1].sum(dim=-1)
    torch.testing.assert_close(values(model, sequences), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("trainable", KINDS)
def test_training_a_separate_critic_moves_it_and_not_the_reward_model(trainable: str):
    base = tiny_model("Llama")
    scorer = reward_model(base)
    frozen = digest(scorer), digest(scorer.trunk), digest(base)
    t = trainer_of(base, config(trainable, "separate", start="reward_model"), reward_model=scorer)
    t.reward = ModelReward(scorer, t.model)
    before = [p.detach().clone() for p in t.model.critic_weights()]
    assert len(before) > 2, "layers or an adapter of its own, beside the head"
    t.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, t.model.critic_weights(), strict=True))
    assert (digest(scorer), digest(scorer.trunk), digest(base)) == frozen
    policy = {p.data_ptr() for p in t.model.policy_weights().values()}
    assert not policy & {p.data_ptr() for p in t.model.critic_weights()}


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("trainable", KINDS)
def test_a_critic_put_back_values_as_it_did(trainable: str, critic: str):
    base = tiny_model("Llama")
    scorer = reward_model(base)
    model = ActorCritic(base, settings(trainable, "reward_model", critic), scorer)
    sequences = draw(model, PROMPTS).sequences
    untrained = values(model, sequences)
    perturb([*model.policy_weights().values(), *model.critic_weights()])
    expected = values(model, sequences)
    assert (expected - untrained)[sequences.mask].abs().min() > 1e-4
    merged = tiny_model("Llama")
    install(merged, model.trained_weights())
    form = "top_layers" if trainable == "top_layers" else "full"  # an adapter is merged
    again = ActorCritic(base, settings(form, "reward_model", critic), scorer)
    again.load_policy(merged.state_dict())
    again.load_critic(model.critic_state())
    torch.testing.assert_close(values(again, sequences), expected, atol=1e-5, rtol=1e-4)
    other = ActorCritic(base, settings(form, "reward_model", "separate" if critic == "shared" else "shared"), scorer)
    with pytest.raises(KeyError, match="critic"):
        other.load_critic(model.critic_state())


@pytest.mark.parametrize("trainable", KINDS)
def test_a_critic_that_cannot_start_as_asked_is_refused(trainable: str):
    base = tiny_model("Llama")
    with pytest.raises(ConfigError, match=r"ppo\.model\.critic_start.*no trained reward model.*set it to policy"):
        ActorCritic(base, settings(trainable, "reward_model"))
    if trainable == "top_layers":
        with pytest.raises(ConfigError, match=r"3 layers of its own, the critic 2.*reward_model\.top_layers"):
            ActorCritic(base, settings(trainable, "reward_model"), reward_model(base, 3))
        # Its layers would read the activations of another model.
        with pytest.raises(ConfigError, match=r"ppo\.model\.critic_start.*another model.*set it to policy"):
            ActorCritic(base, settings(trainable, "reward_model"), reward_model(tiny_model("Llama", seed=1)))


def test_a_reward_model_over_another_model_reads_activations_of_its_own():
    base = tiny_model("Llama")
    scorer = reward_model(tiny_model("Llama", seed=1))
    model = ActorCritic(base, settings("top_layers", "policy"))
    samples = draw(model, PROMPTS)
    rows = zip(samples.sequences.tokens, samples.sequences.attention, samples.ended.tolist(), strict=True)
    texts = [tokens[there].tolist()[: -1 if ended else None] for tokens, there, ended in rows]
    found = ModelReward(scorer, model)(samples, model.activations(samples.sequences))
    torch.testing.assert_close(found, score_texts(scorer, texts), atol=1e-5, rtol=0)
