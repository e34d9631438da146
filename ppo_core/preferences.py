"""Learning a scorer from preference pairs (Bradley-Terry; Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from ppo_core.errors import TrainingHealthError
from ppo_core.losses import preference_loss
from ppo_core.precision import MasterWeights
from ppo_core.schedules import learning_rate_factor
from ppo_core.scorers import TextScorer, raw_scores
from ppo_core.seeds import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs over a list of texts; pairs of one group lie together and share texts."""

    texts: list[list[int]]
    """Token ids of each text."""
    chosen: list[int]
    """Index into `texts`, one a pair."""
    rejected: list[int]
    target: list[float]
    """Probability that people prefer the chosen one."""

    def __len__(self) -> int:
        return len(self.chosen)


def fit(
    scorer: TextScorer,
    pairs: Pairs,
    *,
    steps: int,
    batch_pairs: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `scorer` in place; `on_step(step, loss)` after each optimiser step.

    The learning rate warms up over the first tenth and falls to zero along a cosine. Raises TrainingHealthError on a
    loss that is not finite.
    """
    weights = MasterWeights(scorer.trained())
    optimiser = torch.optim.AdamW(weights.masters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, partial(learning_rate_factor, "cosine", warmup=max(1, steps // 10), horizon=steps)
    )
    try:
        for step, batch in enumerate(islice(_batches(pairs, batch_pairs, seed), steps)):
            loss = _batch_loss(scorer, pairs, batch)
            if not loss.isfinite():
                raise TrainingHealthError(
                    f"the preference loss is {loss.item()} at step {step}", "reward_model", "lower the learning rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.masters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            weights.publish()
            on_step(step, loss.item())
    finally:
        weights.release()


def _batch_loss(scorer: TextScorer, pairs: Pairs, batch: Sequence[int]) -> torch.Tensor:
    """A text that several pairs of the batch share is read once."""
    used = sorted({pairs.chosen[i] for i in batch} | {pairs.rejected[i] for i in batch})
    position = {text: row for row, text in enumerate(used)}
    scores = raw_scores(scorer, [pairs.texts[i] for i in used])
    chosen = scores[[position[pairs.chosen[i]] for i in batch]]
    rejected = scores[[position[pairs.rejected[i]] for i in batch]]
    target = torch.tensor([pairs.target[i] for i in batch], device=scores.device)
    return preference_loss(chosen, rejected, target=target)


def _batches(pairs: Pairs, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of neighbouring pairs, in a new order each epoch."""
    size = min(size, len(pairs))
    starts = range(0, len(pairs) - size + 1, size)
    epoch = 0
    while True:
        offset = int(torch.randint(size, (1,), generator=generator(seed, "offset", epoch)))
        for k in torch.randperm(len(starts), generator=generator(seed, "pairs", epoch)).tolist():
            # The offset moves the borders, so that no group is cut at the same place twice.
            yield [(offset + starts[k] + i) % len(pairs) for i in range(size)]
        epoch += 1
