"""Training: gradients, the state of a run, and policies that must learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import MODES, config, trainer

from ppo_core.config import PPOConfig
from ppo_core.types import Rollout


def test_gradients_do_not_depend_on_the_micro_batch_split(policy_folder: Path):
    # Of 8 responses each has another length, so that a mean of the micro-batches' means would be another gradient.
    gradients = []
    for micro_batch in (8, 4, 2, 1):
        t = trainer(policy_folder, config(micro_batch=micro_batch))
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


@pytest.mark.parametrize("kl_target", [None, 3.0])
@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_save_load_continue_equals_never_having_stopped(policy_folder: Path, trainable: str, critic: str, kl_target):
    settings = config(trainable, critic)
    reward = settings.reward.model_copy(update={"kl_target": kl_target, "kl_horizon": 20})
    settings = settings.model_copy(update={"reward": reward})
    through = trainer(policy_folder, settings)
    stats = [through.step() for _ in range(3)][-1]
    first, second = trainer(policy_folder, settings), trainer(policy_folder, settings)
    first.step()
    tensors, plain = first.state()
    second.load_state({k: v.clone() for k, v in tensors.items()}, plain)
    again = [second.step() for _ in range(2)][-1]
    for a, b in zip(through.optimiser.weights.masters, second.optimiser.weights.masters, strict=True):
        assert torch.equal(a, b)
    timeless = {k for k in stats if not k.endswith("_s")}
    assert {k: stats[k] for k in timeless} == {k: again[k] for k in timeless}
    # Without the optimiser's moments it is another run: the comparison above can fail.
    third = trainer(policy_folder, settings)
    third.load_state({k: torch.zeros_like(v) if "exp_avg" in k else v.clone() for k, v in tensors.items()}, plain)
    third.step()
    third.step()
    assert not torch.equal(third.optimiser.weights.masters[0], through.optimiser.weights.masters[0])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_is_rewarded(policy_folder: Path, seed: int):
    # A uniform policy over 512 tokens scores -6 * 256 / 1000 = -1.5; the best possible is 0.
    settings = config("full", learning_rate=1e-2, critic_learning_rate=1e-2, epochs=4, micro_batch=16)
    t = trainer(policy_folder, settings.model_copy(update={"rollout_size": 64}), seed)
    scores = [t.step()["score"] for _ in range(8)]
    assert scores[0] == pytest.approx(-1.5, abs=0.1)
    assert scores[-1] > -0.9


def test_every_prompt_comes_once_an_epoch_in_a_new_order(policy_folder: Path):
    t = trainer(policy_folder, config())  # 8 responses an iteration from 4 prompts: two epochs each
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
