"""Courses of a learning rate."""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, *, warmup: int, horizon: int) -> float:
    """What multiplies the learning rate at a step, counted from 0.

    It rises linearly over `warmup` steps, then stays ("constant"), falls linearly ("linear") or along half a cosine
    ("cosine") until it is 0 at step `horizon`, and stays there.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, horizon - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; choose constant, linear or cosine")
