"""What MLflow is told of a run, in its own words: flat parameters and figures, the code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.workspace import SMALL_RESULTS


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


def gap_tags(stage: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """STAGE.not_measured: what could not be measured and why, which no number could say."""
    if "not_measured" not in metrics:
        return {}
    words = "; ".join(f"{key}: {why}" for key, why in metrics["not_measured"].items())
    return {f"{stage}.not_measured": cut(words or "none")}


def cut(value: str, limit: int = 6000) -> str:
    """MLflow holds 6,000 characters of a parameter."""
    note = "... (cut; whole in the artifact params.yaml)"
    return value if len(value) <= limit else value[: limit - len(note)] + note


def git_tags(root: Path) -> dict[str, str]:
    """The commit of the checkout and whether files differ from it; empty where there is no commit."""
    if (found := git_commit(root)) is None:
        return {}
    commit, changed = found
    return {"mlflow.source.git.commit": commit, "proximal.git.dirty": str(changed).lower()}


def git_commit(root: Path) -> tuple[str, bool] | None:
    """The commit of the checkout and whether tracked files differ from it; None where there is no commit.

    Results that git holds do not count: they change with every run, which says nothing of the code.
    """
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    results = (f":!{name}" for name in SMALL_RESULTS)
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return (commit, bool(changes)) if commit else None


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
