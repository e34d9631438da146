"""What MLflow is told of a run, in its own words: flat parameters and figures, the code, the process that writes."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

HOST, PID, STARTED = "proximal.host", "proximal.pid", "proximal.process_started"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted.key, leaf) of nested mappings and lists; an empty one is a leaf."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    inner = [(f"{prefix}.{key}" if prefix else str(key), child) for key, child in items]
    if not inner:
        yield prefix, value
    for key, child in inner:
        yield from flatten(child, key)


def numbers(value: Any, prefix: str) -> Iterator[tuple[str, float]]:
    """The leaves that are numbers; texts and gaps stay in the report."""
    for key, leaf in flatten(value, prefix):
        if isinstance(leaf, int | float):
            yield key, float(leaf)


def cut(value: str, limit: int = 6000) -> str:
    """MLflow holds 6,000 characters of a parameter."""
    note = "... (cut; whole in the artifact params.yaml)"
    return value if len(value) <= limit else value[: limit - len(note)] + note


def git_tags(root: Path) -> dict[str, str]:
    """The commit of the checkout and whether files differ from it; empty where there is no repository."""
    commit = _git(root, "rev-parse", "HEAD")
    # Results that git holds change with every run, which says nothing of the code.
    results = (":!metrics", ":!plots", ":!dvc.lock")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return {"mlflow.source.git.commit": commit, "proximal.git.dirty": str(bool(changes)).lower()} if commit else {}


def process_tags() -> dict[str, str]:
    """Who is writing: host, process, and when that began, which tells it from a later one of the same number."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: str(psutil.Process().create_time())}


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags belongs to this machine; of other machines nothing can be known."""
    return tags.get(HOST) == socket.gethostname()


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of these tags, on this machine, still runs. One that nobody has buried yet is dead."""
    try:
        process = psutil.Process(int(tags[PID]))
        began: float = process.create_time()
        return abs(began - float(tags[STARTED])) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
