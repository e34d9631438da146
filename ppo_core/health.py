"""Signs that training has gone wrong: a warning the first time, the end when they persist."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from ppo_core.config import HealthConfig
from ppo_core.errors import TrainingHealthError
from ppo_core.types import Rollout

log = logging.getLogger(__name__)


def symptoms(stats: Mapping[str, float], rollout_size: int, config: HealthConfig) -> dict[str, str]:
    """What ails an iteration, by name, with what to change."""
    found = {}
    if stats["score_std"] < config.min_score_std:
        found["constant reward"] = "every response got the same score: check the reward model"
    if stats["empty"] > rollout_size / 2:
        found["empty responses"] = (
            "most responses end at once: check the prompts' format, or set ppo.sampling.min_new_tokens"
        )
    if stats["entropy"] < config.min_entropy:
        found["collapsed policy"] = "it always says the same: raise ppo.reward.kl_coef or ppo.loss.entropy_coef"
    if stats["length"] < config.min_length:
        found["collapsed length"] = "it hardly answers: raise ppo.reward.kl_coef or set ppo.sampling.min_new_tokens"
    if stats["repetition"] > config.max_repetition:
        found["repetition"] = "it says the same again and again: raise ppo.reward.kl_coef, or check the reward model"
    if not stats["sampler_gap"] <= config.max_sampler_gap:
        found["sampler apart"] = (
            "tokens were sampled with other probabilities than the policy's: check what samples (a vLLM server? "
            "docs/vllm.md), or raise ppo.health.max_sampler_gap"
        )
    return found


class Health:
    """Remembers for how many iterations in a row what has ailed."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.streaks: dict[str, int] = {}

    def check(self, stats: Mapping[str, float], rollout_size: int, where: str) -> None:
        """Warn of symptoms; raise TrainingHealthError for one that was there `patience` times in a row."""
        found = symptoms(stats, rollout_size, self.config)
        self.streaks = {name: self.streaks.get(name, 0) + 1 for name in sorted(found)}
        for name, mend in found.items():
            if self.streaks[name] >= self.config.patience:
                raise TrainingHealthError(f"{name}, {self.streaks[name]} iterations in a row", where, mend)
            log.warning("%s: %s; %s", where, name, mend)

    def state_dict(self) -> dict[str, int]:
        return dict(self.streaks)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.streaks = dict(state)


def refuse_non_finite(rollout: Rollout, where: str) -> None:
    """Raise TrainingHealthError, naming the responses, if a number in `rollout` that counts is NaN or infinite."""
    per_token = {"logprobs": "log-probabilities", "ref_logprobs": "reference log-probabilities", "values": "values"}
    sick = {plain: (~getattr(rollout, name).isfinite() & rollout.mask).any(dim=1) for name, plain in per_token.items()}
    sick["scores"] = ~rollout.scores.isfinite()
    for plain, rows in sick.items():
        if rows.any():
            mend = "check the reward" if plain == "scores" else "lower ppo.update.learning_rate"
            place = f"{where}, {named_responses(rows.nonzero().squeeze(1))}"
            raise TrainingHealthError(f"{plain} are not finite", place, mend)


def named_responses(rows: Tensor) -> str:
    """How messages name rows [n] of a rollout, counted from 1."""
    numbers = sorted(rows.tolist())
    shown = ", ".join(str(row + 1) for row in numbers[:16])
    return f"responses {shown}{' and others' if len(numbers) > 16 else ''} of the rollout"
