"""Randomness by name: a choice is drawn from a generator seeded by what it is for.

Nothing depends on what was drawn before it, so a resumed run needs counters, not generator states, and a row's sample
does not depend on the batch it was in.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the use that `names` spell out."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the use that `names` spell out."""
    return torch.Generator().manual_seed(derive(seed, *names))
