"""Which process this is, which one had it started, and whether one still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil  # type: ignore[import-untyped]

HOST, PID, STARTED = "proximal.host", "proximal.pid", "proximal.process_started"
_SHELLS = {"ash", "bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh"}


def process_tags() -> dict[str, str]:
    """Who is writing: host, process, and when that began, which tells it from a later one of the same number."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: str(psutil.Process().create_time())}


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags belongs to this machine; of other machines nothing can be known."""
    return tags.get(HOST) == socket.gethostname()


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags, on this machine, still runs."""
    try:
        process = psutil.Process(int(tags[PID]))
        return abs(process.create_time() - float(tags[STARTED])) < 2 and is_running(process)
    except psutil.NoSuchProcess:
        return False


def is_running(process: psutil.Process) -> bool:
    """Whether the process still does something: a zombie has ended, and only waits for a parent that may never ask."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def caller() -> psutil.Process | None:
    """The nearest ancestor that is not a shell; None where there is none.

    Some shells become the command that they were given; others, dash for one, stay and outlive who called them.
    """
    ancestor = psutil.Process().parent()
    while ancestor is not None and ancestor.name() in _SHELLS:
        ancestor = ancestor.parent()
    return ancestor
