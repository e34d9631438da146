"""The networks and the trainer on a tiny Llama: what must be equal, and what must not move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy
from transformers import AutoModelForCausalLM

from ppo_core.config import ModelConfig, PPOConfig, SamplingConfig
from ppo_core.decoder import load_causal_lm, split, without_dropout
from ppo_core.law import SamplingLaw
from ppo_core.logprobs import token_logprobs
from ppo_core.models import ActorCritic
from ppo_core.rollout import ModelReward
from ppo_core.sampling import inverse_cdf, sample
from ppo_core.scorers import RewardModel, score_texts
from ppo_core.trainer import Trainer
from ppo_core.types import Rollout, Samples

EOS = PAD = 2
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61], [1, 70, 71, 72, 73, 74]]
MODES = [(trainable, critic) for trainable in ("top_layers", "lora", "full") for critic in ("shared", "separate")]


def length_reward(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    """Likes low token ids."""
    sequences = samples.sequences
    return -(sequences.responses * sequences.mask).sum(dim=1) / 1000.0


def config(trainable: str = "top_layers", critic: str = "shared", **update) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "rollout_size": 8,
            "model": {"trainable": trainable, "top_layers": 2, "critic": critic, "dtype": "float32"}
            | {"critic_start": "policy"},
            "sampling": {"max_new_tokens": 6, "temperature": 0.7},
            "update": {"epochs": 2, "minibatches": 2, "micro_batch": 2, "learning_rate": 1e-3} | update,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def trainer(folder: Path, settings: PPOConfig, seed: int = 3) -> Trainer:
    torch.manual_seed(0)
    model = ActorCritic(load_causal_lm(folder, torch.float32), settings.model)
    return Trainer(model, length_reward, PROMPTS, settings, seed=seed, law=law(settings.sampling), pad=PAD)


def law(settings: SamplingConfig) -> SamplingLaw:
    return SamplingLaw(settings, [EOS])


def draw(model: ActorCritic, prompts: list[list[int]], **sampling) -> Samples:
    settings = SamplingConfig(max_new_tokens=8, **sampling)
    return sample(model.sampler, model.policy_head, prompts, law(settings), range(len(prompts)), PAD)


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_sampled_logprobs_are_those_of_a_plain_forward(folder: Path, trainable: str, critic: str):
    model = trainer(folder, config(trainable, critic)).model
    samples = draw(model, PROMPTS, temperature=0.7)
    sequences = samples.sequences
    with torch.no_grad():
        now = model.evaluate(model.activations(sequences), sequences, law(SamplingConfig(temperature=0.7)))
    torch.testing.assert_close(now.logprobs[sequences.mask], samples.logprobs[sequences.mask], atol=1e-5, rtol=0)
    # The independent oracle: transformers itself, each row alone, without padding.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, prompt in enumerate(PROMPTS):
        tokens = sequences.tokens[row][sequences.attention[row]]
        with torch.no_grad():
            logits = plain(tokens.unsqueeze(0)).logits[:, len(prompt) - 1 : -1]
        expected = token_logprobs(logits, tokens[len(prompt) :].unsqueeze(0), 0.7)[0]
        torch.testing.assert_close(now.logprobs[row][sequences.mask[row]], expected, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_neighbours(folder: Path):
    model = trainer(folder, config()).model
    together = draw(model, PROMPTS).sequences
    for row, prompt in enumerate(PROMPTS):
        settings = SamplingConfig(max_new_tokens=8)
        alone = sample(model.sampler, model.policy_head, [prompt], law(settings), [row], PAD).sequences
        kept = together.responses[row][together.mask[row]]
        assert alone.responses[0][alone.mask[0]].tolist() == kept.tolist()


def test_the_sampler_follows_the_law():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1))
    drawn = inverse_cdf(law.log().expand(n, 4), uniforms).bincount(minlength=4)
    chi_squared = ((drawn - n * law) ** 2 / (n * law)).sum().item()
    assert chi_squared < 16.27  # 99.9 % quantile at 3 degrees of freedom
    assert inverse_cdf(law.log().expand(2, 4), torch.tensor([0.0, 1 - 1e-7])).tolist() == [0, 3]


def test_responses_stop_after_eos_and_keep_it(folder: Path):
    model = trainer(folder, config()).model

    class AlwaysEos(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 512)
            logits[..., EOS] = 100.0
            return logits

    samples = sample(model.sampler, AlwaysEos(), PROMPTS, law(SamplingConfig()), range(4), PAD)
    assert samples.ended.all()
    assert samples.sequences.mask.sum(dim=1).tolist() == [1, 1, 1, 1]
    assert samples.sequences.responses[:, 0].tolist() == [EOS] * 4


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_without_learning_nothing_moves(folder: Path, trainable: str, critic: str):
    t = trainer(folder, config(trainable, critic, learning_rate=1e-30, critic_learning_rate=1e-30))
    stats = t.step()
    assert stats["ratio"] == pytest.approx(1, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["clip_fraction"] == 0
    assert stats["kl"] == pytest.approx(0, abs=1e-4)  # policy and reference are still the same


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_training_moves_the_policy_and_never_the_reference(folder: Path, trainable: str, critic: str):
    t = trainer(folder, config(trainable, critic))
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
def test_trained_weights_are_named_as_in_transformers(folder: Path, trainable: str):
    t = trainer(folder, config(trainable))
    t.step()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = plain.load_state_dict({k: p.detach() for k, p in t.model.policy_weights().items()}, strict=False)
    assert not result.unexpected_keys
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = plain(tokens).logits
        ours = t.model.policy_head(t.model.sampler.start().step(tokens, tokens > 0, torch.arange(4).unsqueeze(0))[-1])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_the_micro_batch_split(folder: Path):
    # Of 8 responses each has another length, so that a mean of the micro-batches' means would be another gradient.
    gradients = []
    for micro_batch in (8, 4, 2, 1):
        t = trainer(folder, config(micro_batch=micro_batch))
        rollout = ragged(t.roll_out())
        experience = t.estimate(rollout)
        t.optimiser._gather(experience, torch.arange(8), 0.05, "")
        gradients.append(torch.cat([m.grad.flatten() for m in t.optimiser.weights.masters]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def ragged(rollout: Rollout) -> Rollout:
    """The same responses, cut to 6, 5, 4, 3, 2, 1, 6 and 5 tokens."""
    sequences = rollout.sequences
    lengths = torch.tensor([6, 5, 4, 3, 2, 1, 6, 5]).unsqueeze(1)
    attention = sequences.attention.clone()
    attention[:, sequences.prompt_length :] &= torch.arange(6) < lengths
    return replace(rollout, sequences=replace(sequences, attention=attention))


def test_the_reward_model_reads_the_same_in_a_padded_batch_and_before_eos(folder: Path):
    torch.manual_seed(3)
    base = load_causal_lm(folder, torch.float32)
    scorer = RewardModel(*split(base, 2), 64, PAD)
    torch.nn.init.normal_(scorer.head.linear.weight)
    model = ActorCritic(base, config().model)
    samples = draw(model, PROMPTS)
    sequences = samples.sequences
    last = sequences.prompt_length + sequences.mask.sum(dim=1) - 1
    sequences.tokens[0, last[0]] = EOS  # one ends, the others are cut
    lengths = sequences.mask.sum(dim=1) - torch.tensor([1, 0, 0, 0])
    samples = replace(samples, ended=torch.tensor([True, False, False, False]), text_lengths=lengths)
    found = ModelReward(scorer, model)(samples, model.activations(sequences))
    texts = [tokens[mask].tolist() for tokens, mask in zip(sequences.tokens, sequences.attention, strict=True)]
    texts[0] = texts[0][:-1]
    expected = torch.cat([scorer.raw([text]) for text in texts])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(score_texts(scorer, texts), expected, atol=1e-5, rtol=0)  # buckets keep the order


def test_dropout_in_the_configuration_is_switched_off(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attention_dropout=0.5)
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


@pytest.mark.parametrize("kl_target", [None, 3.0])
@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_save_load_continue_equals_never_having_stopped(folder: Path, trainable: str, critic: str, kl_target):
    settings = config(trainable, critic)
    reward = settings.reward.model_copy(update={"kl_target": kl_target, "kl_horizon": 20})
    settings = settings.model_copy(update={"reward": reward})
    through = trainer(folder, settings)
    stats = [through.step() for _ in range(3)][-1]
    first, second = trainer(folder, settings), trainer(folder, settings)
    first.step()
    tensors, plain = first.state()
    second.load_state({k: v.clone() for k, v in tensors.items()}, plain)
    again = [second.step() for _ in range(2)][-1]
    for a, b in zip(through.optimiser.weights.masters, second.optimiser.weights.masters, strict=True):
        assert torch.equal(a, b)
    timeless = {k for k in stats if not k.endswith("_s")}
    assert {k: stats[k] for k in timeless} == {k: again[k] for k in timeless}
    # Without the optimiser's moments it is another run: the comparison above can fail.
    third = trainer(folder, settings)
    third.load_state({k: torch.zeros_like(v) if "exp_avg" in k else v.clone() for k, v in tensors.items()}, plain)
    third.step()
    third.step()
    assert not torch.equal(third.optimiser.weights.masters[0], through.optimiser.weights.masters[0])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_is_rewarded(folder: Path, seed: int):
    # A uniform policy over 512 tokens scores -6 * 256 / 1000 = -1.5; the best possible is 0.
    settings = config("full", learning_rate=1e-2, critic_learning_rate=1e-2, epochs=4, micro_batch=16)
    t = trainer(folder, settings.model_copy(update={"rollout_size": 64}), seed)
    scores = [t.step()["score"] for _ in range(8)]
    assert scores[0] == pytest.approx(-1.5, abs=0.1)
    assert scores[-1] > -0.9


def test_bfloat16_keeps_float32_masters(folder: Path):
    settings = config().model_copy(update={"model": ModelConfig(top_layers=2, dtype="bfloat16")})
    model = ActorCritic(load_causal_lm(folder, torch.bfloat16), settings.model)
    t = Trainer(model, length_reward, PROMPTS, settings, seed=1, law=law(settings.sampling), pad=PAD)
    stats = t.step()
    assert stats["kl"] == 0  # scored by the same arithmetic as the reference
    assert all(m.dtype == torch.float32 for m in t.optimiser.weights.masters)
    weights = zip(t.optimiser.weights.working, t.optimiser.weights.masters, strict=True)
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in weights)


def test_every_prompt_comes_once_an_epoch_in_a_new_order(folder: Path):
    t = trainer(folder, config())  # 8 responses an iteration from 4 prompts: two epochs each
    t.prompts = [[1, i] for i in range(12)]
    seen = []
    for t.iteration in range(6):
        seen += [prompt[1] for prompt in t.next_prompts()]
    epochs = [seen[start : start + 12] for start in range(0, 48, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("reward", [{"kl_target": 3.0, "kl_horizon": 1}, {"kl_target": 3.0, "kl_coef": 0.0}])
def test_an_adaptive_coefficient_that_cannot_work_is_refused(reward: dict[str, float]):
    with pytest.raises(ValueError, match="adaptive KL coefficient"):
        PPOConfig.model_validate({"reward": reward})
