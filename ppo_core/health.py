"""Signs that training has gone wrong: the first time a warning, the second time in a row the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from ppo_core.errors import TrainingHealthError

log = logging.getLogger(__name__)


def symptoms(stats: Mapping[str, float], rollout_size: int) -> dict[str, str]:
    """What ails an iteration, by name, with what to change."""
    found = {}
    if stats["score_std"] < 1e-4:
        found["constant reward"] = "every response got the same score: check the reward model"
    if stats["empty"] > rollout_size / 2:
        found["empty responses"] = "most responses end at once: check the prompts' format"
    if stats["entropy"] < 0.05:
        found["collapsed policy"] = "it always says the same: raise ppo.reward.kl_coef or ppo.loss.entropy_coef"
    return found


class Health:
    """Remembers what ailed the last iteration."""

    def __init__(self) -> None:
        self.last: list[str] = []

    def check(self, stats: Mapping[str, float], rollout_size: int, where: str) -> None:
        """Warn of new symptoms; raise TrainingHealthError for one that was there last time too, or for NaN at once."""
        if broken := [name for name, value in stats.items() if not math.isfinite(value)]:
            mend = "check the reward model" if "score" in broken else "lower ppo.update.learning_rate"
            raise TrainingHealthError(f"not finite: {', '.join(broken)}", where, mend)
        found = symptoms(stats, rollout_size)
        for name, mend in found.items():
            if name in self.last:
                raise TrainingHealthError(name, where, mend)
            log.warning("%s: %s; %s", where, name, mend)
        self.last = sorted(found)
