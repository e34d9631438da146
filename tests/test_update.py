"""The update: gradients whatever the split, targets that stay, early stop, warm-up, schedules, clipping, PTX."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from toy import equal, toy_config, toy_model, toy_trainer, weights_of

from ppo_core import update
from ppo_core.trainer import Trainer
from ppo_core.types import Experience, Rollout

TEXTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 3], [5, 5]]
MODES = [(trainable, critic) for trainable in ("top_layers", "lora", "full") for critic in ("shared", "separate")]


def ragged(rollout: Rollout) -> Rollout:
    """The same responses of 6 tokens, cut to 6, 5, 4, 3, 2, 1, 6 and 5."""
    sequences = rollout.sequences
    assert sequences.mask.all()
    attention = sequences.attention.clone()
    attention[:, sequences.prompt_length :] = torch.arange(6) < torch.tensor([6, 5, 4, 3, 2, 1, 6, 5]).unsqueeze(1)
    return replace(rollout, sequences=replace(sequences, attention=attention))


def gradients(t: Trainer) -> torch.Tensor:
    return torch.cat([torch.zeros(m.numel()) if m.grad is None else m.grad.flatten() for m in masters(t)])


def masters(t: Trainer) -> list[torch.Tensor]:
    return t.optimiser.weights.masters


def slots(t: Trainer) -> dict[int, dict[str, torch.Tensor]]:
    return copy.deepcopy(t.optimiser.adam.state_dict()["state"])


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("aggregation", ["tokens", "sequences"])
def test_gradients_do_not_depend_on_the_micro_batch_split(aggregation: str, kl_in: str):
    found = []
    for micro_batch in (8, 4, 3, 2, 1):
        config = toy_config(
            update={"micro_batch": micro_batch}, reward={"kl_in": kl_in}, sampling={"min_new_tokens": 6},
            loss={"aggregation": aggregation, "entropy_coef": 0.1, "ptx_coef": 0.5, "ptx_batch": 8},
        )  # fmt: skip
        t = toy_trainer(config, ptx=TEXTS)
        experience = t.estimate(ragged(t.roll_out()))
        figures = t.optimiser._gather(experience, torch.arange(8), 0.05, "")
        figures["ptx_loss"] = t.optimiser._gather_ptx(torch.Generator().manual_seed(0), "")
        found.append((gradients(t), figures))
    whole, figures = found[0]
    for gradient, others in found[1:]:
        torch.testing.assert_close(gradient, whole, atol=2e-6, rtol=1e-4)
        assert others == pytest.approx(figures, rel=1e-4, abs=1e-6)
    # The mean of the means of micro-batches would be another gradient: this is no case where all are equal.
    assert whole.abs().max() > 1e-2


def test_every_epoch_learns_from_what_was_recorded_once(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(name: str, new: torch.Tensor, old: torch.Tensor, target: torch.Tensor, *rest: Any) -> Any:
        seen.append((name, old.clone(), target.clone()))
        return original[name](new, old, target, *rest)

    original = {"policy_loss": update.policy_loss, "value_loss": update.value_loss}
    for name in original:
        monkeypatch.setattr(update, name, partial(record, name))
    t = toy_trainer(toy_config(update={"epochs": 3, "minibatches": 1, "micro_batch": 8}))
    experience = t.estimate(t.roll_out())
    rollout = experience.rollout
    sampled = {name: x.clone() for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    before = weights_of(t)
    t.optimiser.update(experience, seed=0, iteration=0, kl_coef=0.1)
    assert not equal(weights_of(t), before)
    assert [name for name, *_ in seen] == ["policy_loss", "value_loss"] * 3
    for name, old, target in seen:
        recorded = (rollout.logprobs, experience.advantages), (rollout.values, experience.returns)
        for given, kept in zip((old, target), recorded[name == "value_loss"], strict=True):
            assert sorted(given.tolist()) == pytest.approx(sorted(kept[rollout.mask].tolist()))
    for name, x in sampled.items():
        assert torch.equal(getattr(rollout, name), x), name
        assert not x.requires_grad, name


def test_an_update_that_went_far_enough_makes_no_further_step():
    config = toy_config(update={"epochs": 4, "learning_rate": 3e-3})
    steps = 0.0
    for limit, expected in ((None, 8), (1e9, 8), (1e-9, 1)):
        t = toy_trainer(toy_config(update=config.update.model_dump() | {"max_approx_kl": limit}))
        steps = t.step()["steps"]
        assert steps == expected  # the first minibatch is scored by the policy that sampled: KL 0, one step
    # What stopped early is what a run with so many steps would be, and nothing is left over.
    t = toy_trainer(toy_config(update=config.update.model_dump() | {"max_approx_kl": 0.1}))
    seen = []
    adam = t.optimiser.adam.step
    t.optimiser.adam.step = lambda: (adam(), seen.append(weights_of(t)))
    stats = t.step()
    assert 1 < stats["steps"] < 8
    assert len(seen) == stats["steps"]
    assert equal(weights_of(t), seen[-1])
    assert all(m.grad is None for m in masters(t))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_while_the_critic_warms_up_nothing_of_the_policy_moves(trainable: str, critic: str, dtype: str):
    config = toy_config(
        model={"trainable": trainable, "critic": critic, "dtype": dtype},
        update={"critic_warmup": 2}, loss={"ptx_coef": 1.0},
    )  # fmt: skip
    t = toy_trainer(config, model=toy_model(dtype=getattr(torch, dtype)), ptx=TEXTS)
    own = len(t.optimiser._of_policy)
    everything = {name: p.clone() for name, p in t.model.named_parameters()}
    critic_weights = {id(p) for p in t.model.critic_weights()}
    before = weights_of(t)
    for _ in range(2):
        stats = t.step()
        assert stats["policy_grad_norm"] == 0
        assert stats["critic_grad_norm"] > 0
    for name, p in t.model.named_parameters():
        if id(p) not in critic_weights:
            assert torch.equal(p, everything[name]), name
    after = weights_of(t)
    assert equal(after[:own], before[:own])
    moved = [not torch.equal(a, b) for a, b in zip(after[own:], before[own:], strict=True)]
    assert sum(moved) >= len(moved) - 2  # the embedding of a token that nobody saw, and in LoRA A while B is 0, stay
    assert slots(t).keys() == set(range(own, len(after)))
    t.step()
    assert not equal(weights_of(t)[:own], before[:own])
    assert slots(t)[0]["step"] == 4  # two epochs of two minibatches: its moments know nothing of the warm-up


def test_the_gradient_is_clipped_by_the_norm_of_policy_and_critic_together():
    found = {}
    for limit in (1e9, 0.1):
        t = toy_trainer(toy_config(update={"max_grad_norm": limit, "epochs": 1, "minibatches": 1, "micro_batch": 8}))
        experience, index = t.estimate(t.roll_out()), torch.arange(8)
        t.optimiser._gather(experience, index, 0.05, "")
        before, own = gradients(t), sum(p.numel() for p in t.optimiser._of_policy)
        norms = t.optimiser._clip("", index)
        found[limit] = before, gradients(t), norms
        assert norms["grad_norm"] == pytest.approx(float(before.norm()), rel=1e-5)
        assert norms["policy_grad_norm"] == pytest.approx(float(before[:own].norm()), rel=1e-5)
        assert norms["critic_grad_norm"] == pytest.approx(float(before[own:].norm()), rel=1e-5)
        assert min(norms.values()) > 0
    before, after, _ = found[1e9]
    assert torch.equal(before, after)
    before, after, norms = found[0.1]
    torch.testing.assert_close(after, before * 0.1 / norms["grad_norm"], rtol=1e-4, atol=1e-8)


def plain_nll(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """Mean over all tokens but each text's first, one text at a time, by transformers alone."""
    terms = []
    for text in texts:
        ids = torch.tensor([text])
        law = model(ids).logits[0].log_softmax(dim=-1)
        terms += [-law[i, token] for i, token in enumerate(text[1:])]
    return torch.stack(terms).mean()


def test_the_language_modelling_term_is_that_of_a_plain_forward():
    # At temperature 1 and with all tokens, whatever the sampler does.
    config = toy_config(
        loss={"ptx_coef": 2.5, "ptx_batch": 6}, sampling={"temperature": 0.5, "top_k": 3}, update={"micro_batch": 4}
    )
    t = toy_trainer(config, ptx=TEXTS)
    chosen = torch.randint(len(TEXTS), (6,), generator=torch.Generator().manual_seed(4)).tolist()
    value = t.optimiser._gather_ptx(torch.Generator().manual_seed(4), "")
    plain = toy_model().requires_grad_(True)
    loss = plain_nll(plain, [TEXTS[i] for i in chosen])
    (2.5 * loss).backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    gradient = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in t.model.policy_weights().items():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-4, atol=1e-6)
    assert len({len(TEXTS[i]) for i in chosen}) > 1


def test_the_language_modelling_term_teaches_the_texts():
    found = []
    for coef in (0.0, 5.0):
        t = toy_trainer(toy_config(loss={"ptx_coef": coef}), ptx=TEXTS)
        for _ in range(3):
            stats = t.step()
        assert ("ptx_loss" in stats) is bool(coef)
        plain = toy_model()
        plain.load_state_dict(t.model.policy_weights(), strict=False)
        found.append(float(plain_nll(plain, TEXTS)))
    assert found[1] < found[0] - 0.5
    with pytest.raises(ValueError, match="ptx_coef needs texts"):
        toy_trainer(toy_config(loss={"ptx_coef": 1.0}))


def test_a_response_without_tokens_changes_no_gradient():
    t = toy_trainer(toy_config())
    rollout = t.roll_out()
    attention = rollout.sequences.attention.clone()
    attention[0, rollout.sequences.prompt_length :] = False
    empty = replace(rollout, sequences=replace(rollout.sequences, attention=attention))
    found = []
    for micro_batch in (1, 8):
        fresh = toy_trainer(toy_config(update={"micro_batch": micro_batch, "epochs": 1, "minibatches": 1}))
        stats = fresh.optimiser.update(fresh.estimate(empty), seed=0, iteration=0, kl_coef=0.1)
        assert stats["ratio_max"] > 0
        found.append(weights_of(fresh))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_minibatches_cover_the_rollout_once_an_epoch_in_orders_of_their_own(monkeypatch: pytest.MonkeyPatch):
    t = toy_trainer(toy_config(update={"epochs": 3, "minibatches": 4}))
    experience = t.estimate(t.roll_out())
    seen: list[list[int]] = []
    gather = t.optimiser._gather

    def record(experience: Experience, index: torch.Tensor, *rest: Any) -> dict[str, float]:
        seen.append(index.tolist())
        return gather(experience, index, *rest)

    monkeypatch.setattr(t.optimiser, "_gather", record)
    for iteration in (0, 1):
        t.optimiser.update(experience, seed=1, iteration=iteration, kl_coef=0.0)
    epochs = [[row for index in seen[start : start + 4] for row in index] for start in range(0, 24, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
