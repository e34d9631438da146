"""Outputs that later stages can trust: each folder holds the SHA-256 of its files, compared before they are used.

DVC would not notice a flipped byte: it takes a file of the same size and time for the same file. No reader of
safetensors or Parquet does either.
"""

from __future__ import annotations

import json
from pathlib import Path

from ppo_core.digests import sha256
from tasks.errors import IntegrityError, Problem
from tasks.workspace import Workspace

SEAL = "manifest.json"


def seal(folder: Path) -> None:
    """Write the digests of all files in `folder` beside them."""
    (folder / SEAL).write_text(json.dumps(_digests(folder), indent=2) + "\n", encoding="utf-8")


def check_inputs(stage: str, workspace: Workspace) -> None:
    """Compare what ingest wrote, and policy and critic that ppo wrote, with their seals, before `stage` reads it.

    Raises IntegrityError naming every file that is another, with both digests. Folders without a seal were made by hand
    and are taken as they are.
    """
    if stage == "ingest":
        return
    folders = [workspace.canonical, workspace.base_model, workspace.judge_base, workspace.reward_base]
    if stage in ("validate", "evaluate"):
        folders.append(workspace.probes)
    if stage in ("evaluate", "register"):
        folders.append(workspace.policy)
    if stage == "evaluate":
        folders.append(workspace.critic)
    problems = [problem for folder in folders if (folder / SEAL).is_file() for problem in _changes(folder, workspace)]
    if problems:
        raise IntegrityError(problems)


def _changes(folder: Path, workspace: Workspace) -> list[Problem]:
    place = folder.relative_to(workspace.root)
    mend = f"remove {place}, then `dvc checkout {place}`, or run the ingest stage again"
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if not isinstance(sealed, dict):
            raise ValueError("it holds no digests")
    except ValueError as error:
        return [Problem(f"is damaged: {error}", str(place / SEAL), mend)]
    found = _digests(folder)
    return [
        Problem(
            f"SHA-256 is {found.get(name, 'that of no file')}, was {sealed.get(name, 'that of no file')} when written",
            str(place / name),
            mend,
        )
        for name in sorted(found.keys() | sealed.keys())
        if found.get(name) != sealed.get(name)
    ]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}
