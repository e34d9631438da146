"""One run at a time in a workspace, and in a training that worktrees share.

The kernel frees these locks when their holder dies, however that happens.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
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
    file = workspace.lock_file
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(file, "this workspace"))
        except Locked:
            if not _is_parent(_holder(file)):
                raise
        else:
            os.environ[HOLDER] = str(os.getpid())
            held.callback(os.environ.pop, HOLDER)
        yield


@contextmanager
def exclusive(file: Path, what: str) -> Iterator[None]:
    """Hold the lock that `file` stands for, on `what`. Raises Locked at once, naming the holder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = _describe(_holder(file), what)
            raise Locked(told, str(file), "wait for it, or end that process") from None
        _write(opened)
        yield


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold the lock that `file` stands for, after waiting for whoever holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


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


def _holder(file: Path) -> dict[str, Any]:
    """Who holds the lock; empty in the moment between taking it and saying so."""
    try:
        holder: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return holder


def _describe(holder: dict[str, Any], what: str) -> str:
    if not holder:
        return f"another run has just begun in {what}"
    return f"another run holds {what}: process {{pid}} on {{host}}, since {{started}}: {{command}}".format(**holder)
