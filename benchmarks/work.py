"""The work that is timed, the same for every contestant. Standard library only: two environments import it."""

from __future__ import annotations

import random
from dataclasses import dataclass

BATCH, MICRO_BATCH, EPOCHS, RESPONSE = 32, 8, 2, 32
VOCABULARY = 49_152
"""Of SmolLM2."""


@dataclass(frozen=True)
class Work:
    """32 prompts, 32 tokens of response at most, 2 epochs over one minibatch in micro-batches of 8."""

    name: str
    shortest: int
    """Prompt, in tokens."""
    longest: int
    ending: int | None
    """A response ends with the first token whose id this divides: as long as chance has it, for every contestant with
    the same law. None: never."""

    def prompts(self, n: int) -> list[list[int]]:
        """Random tokens; their lengths spread evenly."""
        draw = random.Random(17)
        return [
            [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(self.shortest, self.longest))] for _ in range(n)
        ]

    def stop_tokens(self) -> list[int]:
        return [2] if self.ending is None else list(range(0, VOCABULARY, self.ending))


WORKS = {work.name: work for work in (Work("equal", 32, 32, None), Work("ragged", 8, 64, 24))}
