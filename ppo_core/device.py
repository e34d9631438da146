"""Where models are put when they are loaded. From there on the model decides: what it is given follows it.

There is no parameter for it: a GPU is hidden from a run by CUDA's own variable, CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import logging
import time
from functools import cache

import torch

log = logging.getLogger(__name__)


@cache
def device() -> torch.device:
    """The first CUDA device where torch sees one, else the CPU; said once in the log."""
    if torch.cuda.is_available():
        log.info("computing on the GPU: %s", torch.cuda.get_device_name())
        return torch.device("cuda", 0)
    log.info("computing on the CPU: torch sees no CUDA device")
    return torch.device("cpu")


def clock() -> float:
    """Seconds on a clock that is read once all that was asked of the device is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def named(where: torch.device) -> str:
    """What a device is called where runs are compared: `cpu`, or the model of the GPU."""
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
