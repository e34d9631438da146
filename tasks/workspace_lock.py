"""One run at a time in a workspace: a lock that the kernel frees when its holder dies, however that happens."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from tasks.errors import Locked
from tasks.workspace import Workspace

HOLDER = "PROXIMAL_LOCK_HOLDER"
"""Environment variable with the holder's process id, by which the processes that it starts know the lock for theirs."""


@contextmanager
def workspace_lock(workspace: Workspace) -> Iterator[None]:
    """Hold the workspace through the block.

    A process that a holder started works under its lock. Raises Locked at once where another run holds it.
    """
    workspace.lock_file.parent.mkdir(parents=True, exist_ok=True)
    with workspace.lock_file.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            if not _is_parent(holder):
                raise Locked(_describe(holder), str(workspace.lock_file), "wait for it, or end that process") from None
            yield
            return
        _write(file)
        os.environ[HOLDER] = str(os.getpid())
        try:
            yield
        finally:
            del os.environ[HOLDER]


def _is_parent(holder: dict[str, Any]) -> bool:
    return str(holder.get("pid")) == os.environ.get(HOLDER) and holder["pid"] != os.getpid()


def _write(file: TextIO) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    file.truncate(0)
    json.dump(holder, file)
    file.flush()


def _read(file: TextIO) -> dict[str, Any]:
    """Who holds the lock; empty in the moment between taking it and saying so."""
    file.seek(0)
    try:
        holder: dict[str, Any] = json.load(file)
    except ValueError:
        return {}
    return holder


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run has just begun in this workspace"
    return "another run holds this workspace: process {pid} on {host}, since {started}: {command}".format(**holder)
