"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil


def eventually(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """What `condition` gives once it is true, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def has_ended(pid: int) -> bool:
    """Also true of a zombie: where tests run, the process that adopts orphans may never reap them."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
