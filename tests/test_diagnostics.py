"""Figures of a rollout by hand, blind to what is masked; those of a cycle against one batch of all its rollouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy import toy_config, toy_trainer

from ppo_core.diagnostics import add_up, describe, explained_variance, mean_of, over_cycle, repetition
from ppo_core.types import Experience, Rollout, Sequences

WIDTH = 7


def experience(lengths: list[int], seed: int, score: float = 0.0) -> Experience:
    """Random figures of responses that are as long as `lengths`; every other one ended."""
    draw = torch.Generator().manual_seed(seed)
    n = len(lengths)
    mask = torch.arange(WIDTH) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(2, 4, (n, WIDTH + 2), generator=draw)
    sequences = Sequences(tokens, torch.cat([torch.ones(n, 2, dtype=torch.bool), mask], dim=1), prompt_length=2)

    def numbers(scale: float) -> Tensor:
        return scale * torch.randn(n, WIDTH, generator=draw) + score

    logprobs, values = -numbers(1.0).abs(), numbers(2.0)
    scores = torch.randn(n, generator=draw) * 3 + score
    ended = torch.arange(n) % 2 == 0
    rollout = Rollout(sequences, tokens, logprobs, logprobs + numbers(0.3), values, numbers(1.0).abs(), scores, ended)
    returns = values + numbers(1.0)
    return Experience(rollout, numbers(1.0), returns)


def together(some: Experience, others: Experience) -> Experience:
    """One batch of both."""

    def cat(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    one, two = some.rollout, others.rollout
    sequences = Sequences(
        cat(one.sequences.tokens, two.sequences.tokens), cat(one.sequences.attention, two.sequences.attention), 2
    )
    names = ("activations", "logprobs", "ref_logprobs", "values", "entropy", "scores", "ended")
    rollout = Rollout(sequences, *(cat(getattr(one, name), getattr(two, name)) for name in names))
    return Experience(rollout, cat(some.advantages, others.advantages), cat(some.returns, others.returns))


def test_figures_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    sequences = Sequences(torch.full((2, 3), 4), torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], dim=1), 1)
    nothing = math.nan
    rollout = Rollout(
        sequences=sequences,
        activations=sequences.tokens,
        logprobs=torch.tensor([[-1.0, -2.0], [-1.0, nothing]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-4.0, nothing]]),
        values=torch.tensor([[0.0, 1.0], [2.0, nothing]]),
        entropy=torch.tensor([[1.0, 2.0], [6.0, nothing]]),
        scores=torch.tensor([1.0, 5.0]),
        ended=torch.tensor([False, True]),
    )
    returns = torch.tensor([[1.0, 1.0], [4.0, nothing]])
    stats = describe(Experience(rollout, torch.full((2, 2), nothing), returns), 0.3)
    # d = .5, -1 and 3: sums over the responses -.5 and 3. k3 = exp(-d) - 1 + d.
    k3 = [math.exp(-0.5) - 0.5, math.e - 2, math.exp(-3) + 2]
    expected = {
        "score": 3, "score_std": 2, "score_max": 5,
        "kl": (-0.5 + 3) / 2, "kl_k3": sum(k3) / 2,
        "entropy": 3, "length": 1.5, "length_std": 0.5, "ended_rate": 0.5, "tokens": 3, "kl_coef": 0.3,
        "value": 1, "value_std": math.sqrt(2 / 3), "return": 2, "return_std": math.sqrt(2),
        # Advantages 1, 0, 2 before whitening.
        "advantage": 1, "advantage_std": math.sqrt(2 / 3), "explained_variance": 1 - (2 / 3) / 2,
        "repetition": 0, "empty": 1,
    }  # fmt: skip
    assert stats == pytest.approx(expected, rel=1e-6)


def test_the_kl_is_a_sum_over_the_response():
    one = experience([3, 2], 0)
    rollout = one.rollout
    twice = replace(
        rollout,
        sequences=Sequences(
            torch.cat([rollout.sequences.tokens, rollout.sequences.responses], dim=1),
            torch.cat([rollout.sequences.attention[:, :2], torch.arange(14) < torch.tensor([[6], [4]])], dim=1),
            2,
        ),
        **{name: doubled(getattr(rollout, name), [3, 2]) for name in ("logprobs", "ref_logprobs", "values", "entropy")},
    )
    found = describe(Experience(twice, doubled(one.advantages, [3, 2]), doubled(one.returns, [3, 2])), 0.0)
    plain = describe(one, 0.0)
    assert found["kl"] == pytest.approx(2 * plain["kl"], rel=1e-5)
    assert found["kl_k3"] == pytest.approx(2 * plain["kl_k3"], rel=1e-5)
    assert found["entropy"] == pytest.approx(plain["entropy"], rel=1e-5)


def doubled(x: Tensor, lengths: list[int]) -> Tensor:
    """Each response's own figures twice, one after the other."""
    rows = [torch.cat([row[:n], row[:n], torch.zeros(14 - 2 * n)]) for row, n in zip(x, lengths, strict=True)]
    return torch.stack(rows)


def test_what_no_mask_counts_changes_no_figure():
    plain = experience([7, 4, 1, 3], 1)
    rollout = plain.rollout
    dirt = torch.where(rollout.mask, 0.0, math.nan)
    # Padding may be any token, far beyond a vocabulary too.
    tokens = torch.where(rollout.sequences.attention, rollout.sequences.tokens, 2**31 + torch.arange(9))
    per_token = ("logprobs", "ref_logprobs", "values", "entropy")
    dirty = replace(
        rollout,
        sequences=replace(rollout.sequences, tokens=tokens),
        **{name: getattr(rollout, name) + dirt for name in per_token},
    )
    clean = describe(plain, 0.1)
    assert clean["repetition"] > 0
    assert describe(Experience(dirty, plain.advantages + dirt, plain.returns + dirt), 0.1) == clean


def test_repetition_by_hand():
    tokens = torch.tensor([
        [5, 6, 7, 5, 6, 7],  # 567 675 756 567: one of four
        [4, 4, 4, 4, 4, 4],  # 444 four times: three of four
        [5, 6, 7, 8, 9, 5],  # all new
        [5, 6, 7, 5, 6, 7],  # only the first five count: 567 675 756
        [4, 4, 4, 4, 4, 4],  # the first two: no trigram
        [0, 0, 0, 0, 0, 1],  # 000 000 000 001: two of four
    ])  # fmt: skip
    mask = torch.arange(6) < torch.tensor([[6], [6], [6], [5], [2], [6]])
    assert repetition(tokens, mask).tolist() == [0.25, 0.75, 0, 0, 0, 0.5]
    # Bigrams 56 67 75 56 67, and so on.
    assert repetition(tokens, mask, n=2).tolist() == pytest.approx([0.4, 0.8, 0, 0.25, 0, 0.6])
    assert repetition(tokens[:, :2], mask[:, :2]).tolist() == [0] * 6  # narrower than a trigram


def test_large_vocabularies_do_not_collide():
    # Two trigrams that would be one number if ids were not kept apart, in a vocabulary of 2^20.
    top = 2**20 - 1
    tokens = torch.tensor([[top, 0, 1, top, 1, 0, top, 0, 1]])
    # (top 0 1) comes twice among seven.
    assert repetition(tokens, torch.ones(1, 9, dtype=torch.bool)).item() == pytest.approx(1 / 7)


def test_explained_variance_of_known_predictions():
    returns, mask = torch.tensor([[1.0, 3.0, 5.0, math.nan]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == 0  # knows the mean alone
    assert explained_variance(returns + 7, returns, mask).item() == 1  # a constant error varies not at all
    assert explained_variance(-returns, returns, mask).item() == -3
    # Residuals 1, -1, 0 of returns with variance 8/3.
    values = torch.tensor([[0.0, 4.0, 5.0, math.nan]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(1 - (2 / 3) / (8 / 3))


@pytest.mark.parametrize("lengths", [([7, 4, 2, 3], [1, 1, 2, 1]), ([5, 5, 5, 5], [5, 5, 5, 5])])
def test_a_cycle_is_described_like_one_batch_of_all_its_iterations(lengths: tuple[list[int], list[int]]):
    parts = [experience(lengths[0], 2, score=0.0), experience(lengths[1], 3, score=1.5)]
    of_parts = [describe(part, 0.1) for part in parts]
    whole = describe(together(*parts), 0.1)
    assert over_cycle(of_parts) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    # Of iterations that differ, a plain mean of the figures would be another.
    assert abs(whole["score"] - of_parts[0]["score"]) > 0.1
    assert over_cycle(of_parts[:1]) == pytest.approx(of_parts[0], rel=1e-6, abs=1e-6)


def test_figures_of_the_update_over_a_cycle():
    parts: list[dict[str, float]] = [
        {"tokens": 10, "ratio": 1, "ratio_max": 3, "steps": 4, "kl_coef": 0.1, "update_s": 2, "sample_s": 1},
        {
            "tokens": 30,
            "ratio": 2,
            "ratio_max": 2,
            "steps": 2,
            "kl_coef": 0.3,
            "update_s": 3,
            "sample_s": 1,
            "ptx_loss": 5,
        },
    ]
    assert over_cycle(parts) == pytest.approx({
        "tokens": 40, "ratio": 1.75, "ratio_max": 3, "steps": 6, "kl_coef": 0.2, "update_s": 5, "sample_s": 2,
        "ptx_loss": 5,  # where there was one
        "update_tokens_per_second": 8, "sample_tokens_per_second": 20,
    })  # fmt: skip


def test_figures_of_micro_batches_and_steps():
    total: dict[str, float] = {}
    add_up(total, {"ratio": 0.25, "ratio_max": -2.0})
    add_up(total, {"ratio": 0.5, "ratio_max": -3.0})
    assert total == {"ratio": 0.75, "ratio_max": -2.0}
    steps = [{"ratio": 1.0, "ratio_max": 4.0}, {"ratio": 2.0, "ratio_max": 3.0, "ptx_loss": 7.0}]
    assert mean_of(steps) == {"ratio": 1.5, "ratio_max": 4.0, "ptx_loss": 7.0}


def test_an_iteration_reports_every_figure_that_is_promised():
    stats = toy_trainer(toy_config(loss={"ptx_coef": 0.1}), ptx=[[3, 4, 5]]).step()
    assert stats.keys() >= {
        "kl", "kl_k3", "clip_fraction", "value_clip_fraction", "approx_kl", "ratio", "ratio_max",
        "explained_variance", "entropy", "grad_norm", "policy_grad_norm", "critic_grad_norm", "advantage",
        "advantage_std", "return", "return_std", "score", "score_std", "score_max", "length", "length_std",
        "ended_rate", "repetition", "empty", "tokens", "steps", "ptx_loss", "kl_coef", "sample_s", "score_s",
        "update_s",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in stats.values())
