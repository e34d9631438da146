"""The law that samples, against plain Python in double precision that knows nothing of ours."""

from __future__ import annotations

import math

import pytest
import torch
from families import VOCABULARY, plain_model, sampler_of
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PROMPTS
from scipy.stats import chi2
from transformers import AutoTokenizer

from ppo_core.config import ModelConfig, SamplingConfig
from ppo_core.errors import ConfigError
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.sampling import inverse_cdf, sample
from ppo_core.types import Samples

STOPS = tuple(range(2, VOCABULARY, 6))
"""A sixth of the vocabulary ends a response, so that lengths differ."""
OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "both": {"top_k": 20, "top_p": 0.6, "temperature": 0.7},
    "min": {"min_new_tokens": 2},
    "all": {"top_k": 12, "top_p": 0.9, "temperature": 1.5, "min_new_tokens": 2},
}
options = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())


def exact_law(logits: list[float], option: dict, position: int) -> dict[int, float]:
    """Token -> probability, by the definitions: divide, forbid, the k likeliest, the smallest set that reaches p."""
    alive = [i for i in range(len(logits)) if position >= option.get("min_new_tokens", 0) or i not in STOPS]
    likeliest = sorted(alive, key=lambda i: -logits[i])[: option.get("top_k", len(logits))]
    weights = {i: math.exp((logits[i] - max(logits)) / option.get("temperature", 1.0)) for i in likeliest}
    nucleus: dict[int, float] = {}
    for token in likeliest:
        if sum(nucleus.values()) >= option.get("top_p", math.inf) * sum(weights.values()):
            break
        nucleus[token] = weights[token]
    return {token: weight / sum(nucleus.values()) for token, weight in nucleus.items()}


def next_logits(tokens: list[int]) -> list[float]:
    """What transformers says of the token after `tokens`, in double precision from there on."""
    with torch.no_grad():
        return plain_model("Llama")(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()


def law(**option) -> SamplingLaw:
    return SamplingLaw(SamplingConfig.model_validate({"max_new_tokens": 8} | option), STOPS)


def draw(prompts: list[list[int]], seeds=None, **option) -> Samples:
    model = plain_model("Llama")
    seeds = range(len(prompts)) if seeds is None else seeds
    return sample(sampler_of(model), model.lm_head, prompts, law(**option), seeds, pad=2)


@pytest.fixture(scope="module")
def actor_critic() -> ActorCritic:
    return ActorCritic(plain_model("Llama"), ModelConfig(trainable="lora", dtype="float32"))


@options
def test_the_sampler_draws_from_the_exact_law(option: dict):
    n, prompt = 3000, [1, 40, 41]
    # Two tokens: the second one comes out of the cache.
    rows = draw([prompt] * n, max_new_tokens=2, **option).sequences
    pairs = [tuple(row[mask].tolist()) for row, mask in zip(rows.responses, rows.mask, strict=True)]
    first = exact_law(next_logits(prompt), option, 0)
    expected: dict[tuple[int, ...], float] = {}
    for token, p in first.items():
        if token in STOPS:
            expected[(token,)] = n * p
        elif n * p > 20:
            second = exact_law(next_logits([*prompt, token]), option, 1)
            expected |= {(token, other): n * p * q for other, q in second.items() if n * p * q > 5}
    counts = [pairs.count(cell) for cell in expected]
    rest = n - sum(counts), n - sum(expected.values())  # all rare cells together
    cells = [*zip(counts, expected.values(), strict=True), *([rest] if rest[1] > 5 else [])]
    statistic = sum((found - want) ** 2 / want for found, want in cells)
    assert len(cells) > 10
    assert statistic < chi2.ppf(0.999, len(cells) - 1)
    assert all(token in first for token, *_ in pairs)


@options
def test_the_kept_sets_are_the_exact_ones_and_so_are_the_log_probabilities(option: dict):
    samples = draw(PROMPTS * 2, **option)
    sequences = samples.sequences
    assert (sequences.kept is not None) == ("top_k" in option or "top_p" in option)
    for row, prompt in enumerate(PROMPTS * 2):
        tokens = [*prompt]
        for t, token in enumerate(sequences.responses[row][sequences.mask[row]].tolist()):
            exact = exact_law(next_logits(tokens), option, t)
            if sequences.kept is not None:
                kept = [i for i in sequences.kept[row, t].tolist() if i >= 0]
                assert sorted(kept) == sorted(exact)
            assert samples.logprobs[row, t].item() == pytest.approx(math.log(exact[token]), abs=1e-4)
            tokens.append(token)
        if sequences.kept is not None:
            assert (sequences.kept[row, len(tokens) - len(prompt) :] == -1).all()


@options
def test_log_probabilities_recomputed_are_those_recorded_whatever_the_batch(option: dict, actor_critic: ActorCritic):
    samples = draw(PROMPTS * 2, **option)
    assert len(set(samples.sequences.mask.sum(dim=1).tolist())) > 1
    for index in (torch.arange(8), torch.tensor([5, 0]), torch.tensor([2]), slice(1, 4)):
        part = samples.rows(index)
        with torch.no_grad():
            activations = actor_critic.activations(part.sequences)
            now = actor_critic.evaluate(activations, part.sequences, law(**option))
        mask = part.sequences.mask
        torch.testing.assert_close(now.logprobs[mask], part.logprobs[mask], atol=1e-5, rtol=0)
        reference = actor_critic.reference_logprobs(activations, part.sequences, law(**option))
        torch.testing.assert_close(reference[mask], part.logprobs[mask], atol=1e-5, rtol=0)
        assert now.entropy.isfinite().all()


@options
def test_rows_keep_their_sets(option: dict):
    whole = draw(PROMPTS * 2, **option).sequences
    if whole.kept is None:
        return
    for index in ([5, 0], [2], [7, 1, 3]):
        part = draw(PROMPTS * 2, **option).rows(torch.tensor(index)).sequences
        for row, source in enumerate(index):
            n = int(whole.mask[source].sum())
            assert torch.equal(part.kept[row, :n], whole.kept[source, :n])


def test_entropy_is_that_of_the_restricted_law(actor_critic: ActorCritic):
    option = OPTIONS["both"]
    sequences = draw([PROMPTS[0]], **option).sequences
    with torch.no_grad():
        found = actor_critic.evaluate(actor_critic.activations(sequences), sequences, law(**option)).entropy
    exact = exact_law(next_logits(PROMPTS[0]), option, 0).values()
    assert found[0, 0].item() == pytest.approx(-sum(p * math.log(p) for p in exact), abs=1e-4)


def test_ties_and_sets_larger_than_the_vocabulary():
    flat = torch.zeros(1, 8)
    assert (~law(top_k=3).at_step(flat, 0).isneginf()).sum() == 3
    assert (~SamplingLaw(SamplingConfig(top_k=99), ()).at_step(flat, 0).isneginf()).sum() == 8
    assert (~SamplingLaw(SamplingConfig(top_p=1.0), ()).at_step(flat, 0).isneginf()).sum() == 8
    # A quarter each: two reach a half, and a little more needs a third.
    for top_p, size in ((0.5, 2), (0.51, 3), (1e-9, 1)):
        assert (~SamplingLaw(SamplingConfig(top_p=top_p), ()).at_step(torch.zeros(1, 4), 0).isneginf()).sum() == size


@given(
    logits=st.lists(st.one_of(st.floats(-300, 30, width=32), st.just(-math.inf)), min_size=1, max_size=40).filter(
        lambda x: max(x) > -math.inf
    ),
    uniform=st.one_of(st.just(0.0), st.just(1 - 2**-24), st.just(1.0), st.floats(0, 1, exclude_max=True, width=32)),
)
@settings(max_examples=100, deadline=None)
def test_a_token_without_probability_is_never_drawn(logits: list[float], uniform: float):
    token, logprob = (float(x) for x in inverse_cdf(torch.tensor([logits]), 2.0, torch.tensor([uniform])))
    law = (torch.tensor(logits, dtype=torch.float64) / 2).softmax(0)
    assert law[int(token)] > 0
    # Below 1e-38 float32 loses digits, and the logarithm stays where it is.
    assert logprob == pytest.approx(math.log(max(law[int(token)].item(), 1e-38)), abs=1e-4)


def test_the_inverse_of_the_distribution_function():
    logits = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-24])
    tokens, logprobs = inverse_cdf(logits.expand(6, 6), 1.0, uniforms)
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4]
    torch.testing.assert_close(logprobs, logits[tokens])


def test_a_law_of_a_tokenizer(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    assert SamplingLaw.of(SamplingConfig(), tokenizer).stop_tokens == (tokenizer.eos_token_id,)
    both = SamplingLaw.of(SamplingConfig(stop_tokens=("<|endoftext|>", "Ġfilm")), tokenizer)
    assert set(both.stop_tokens) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "Ġfilm"]))
    with pytest.raises(ConfigError, match=r"\['never'\].*ppo\.sampling\.stop_strings"):
        SamplingLaw.of(SamplingConfig(stop_tokens=("<|endoftext|>", "never")), tokenizer)
    with pytest.raises(ConfigError, match="decode"):
        SamplingLaw(SamplingConfig(stop_strings=("x",)), (2,))


def test_a_tokenizer_without_eos_needs_another_end(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder, eos_token=None)
    assert SamplingLaw.of(SamplingConfig(stop_tokens=("<|endoftext|>",)), tokenizer).stop_tokens == (0,)
    assert SamplingLaw.of(SamplingConfig(stop_strings=("\n",)), tokenizer).stop_tokens == ()
    with pytest.raises(ConfigError, match=r"sampling\.stop_tokens.*no end-of-sequence token.*sampling\.stop_strings"):
        SamplingLaw.of(SamplingConfig(), tokenizer)


@pytest.mark.parametrize("sampling", [{"min_new_tokens": 9, "max_new_tokens": 8}, {"stop_strings": [""]}, {"top_p": 0}])
def test_an_impossible_law_is_refused(sampling: dict):
    with pytest.raises(ValueError, match=r"min_new_tokens 9|empty stop|greater than 0"):
        SamplingConfig.model_validate(sampling)
