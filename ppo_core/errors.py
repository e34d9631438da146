"""What can go wrong, each kind with the exit code that a scheduler can act on.

A message says what is wrong, where (file:row:field) and how to mend it. `assert` is kept for our own bugs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what`, `where` (file:row:field, or a parameter's path) and `mend`."""

    what: str
    where: str = ""
    mend: str = ""

    def __str__(self) -> str:
        return " — ".join(part for part in (self.where, self.what, self.mend) if part)


class ProximalError(Exception):
    """Base of every error meant for people. `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str | Sequence[Problem], where: str = "", mend: str = "") -> None:
        self.problems = (Problem(what, where, mend),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(map(str, self.problems)))


class ConfigError(ProximalError):
    """A parameter is unknown, impossible or contradicts another."""

    exit_code = 2


class IntegrityError(ProximalError):
    """A checkpoint or model on disk is not what was written."""

    exit_code = 4


class ResumeMismatch(ProximalError):
    """A run cannot be continued as it was: versions, device or thread count differ."""

    exit_code = 5


class TrainingHealthError(ProximalError):
    """Training is not worth continuing: non-finite numbers, or a policy that has collapsed."""

    exit_code = 7


class ResourceError(ProximalError):
    """The machine lacks what the run needs: memory, disk, a device."""

    exit_code = 8
