"""What a training goes by: the order of its prompts, and parameters that cannot work together."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import config, trainer

from ppo_core.config import PPOConfig


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
