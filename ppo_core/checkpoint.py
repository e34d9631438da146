"""Checkpoints that are either whole or not there.

A folder is written beside its place, synced to disk, sealed by a manifest with the SHA-256 of every file, and
renamed. Tensors are safetensors, the rest is JSON; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ppo_core.errors import IntegrityError

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], plain: Mapping[str, Any]) -> None:
    """Write `tensors` (file name -> tensors) and `plain` (file name -> JSON value) as the checkpoint `folder`.

    A checkpoint that exists is never touched: FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(folder)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # what a killed process left
    beside.mkdir(parents=True)
    for name, content in tensors.items():
        save_file({key: t.detach().contiguous().cpu() for key, t in content.items()}, beside / name)
    for name, value in plain.items():
        (beside / name).write_text(json.dumps(value, indent=2, allow_nan=False), encoding="utf-8")
    digests = {path.name: sha256(path) for path in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps(digests, indent=2), encoding="utf-8")
    for path in (*beside.iterdir(), beside):
        _sync(path)
    beside.rename(folder)
    _sync(folder.parent)


def verify_checkpoint(folder: Path) -> None:
    """Raise IntegrityError unless every file is the one that was written."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"has no readable manifest ({error})", str(folder), "delete the folder") from error
    for name, expected in digests.items():
        path = folder / name
        found = sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise IntegrityError(
                f"SHA-256 is {found}, was {expected} when written",
                str(path),
                f"delete {folder} to use the one before it",
            )


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file of a verified checkpoint."""
    return load_file(path)


def load_plain(path: Path) -> Any:
    """The JSON value of one file of a verified checkpoint."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
