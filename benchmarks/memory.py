"""The most memory that a process has held, where its tensors are. torch and the standard library only."""

from __future__ import annotations

import resource

import torch


def peak_bytes() -> int:
    """Of the GPU, what torch has allocated there; else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
