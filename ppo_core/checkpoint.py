"""Checkpoints that are either whole or not there.

A folder is written beside its place, synced to disk, sealed by a manifest with the SHA-256 of every file, and
renamed. Tensors are safetensors, the rest is JSON; no pickle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ppo_core.digests import sha256
from ppo_core.errors import IntegrityError, ResourceError

MANIFEST = "manifest.json"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OVERHEAD = 1 << 20
"""Bytes allowed for headers, records and the file system's own."""


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], plain: Mapping[str, Any]) -> None:
    """Write `tensors` (file name -> tensors) and `plain` (file name -> JSON value) as the checkpoint `folder`.

    A checkpoint that exists is never touched: FileExistsError. Raises ResourceError, and leaves nothing, where the disk
    has no room.
    """
    if folder.exists():
        raise FileExistsError(folder)
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)  # what a killed process left
    beside.mkdir(parents=True)
    needed = size_of(*tensors.values())
    try:
        with needs_room(folder.parent, needed):
            _write(beside, tensors, plain)
    except ResourceError:
        shutil.rmtree(beside)  # half a checkpoint is of no use to anyone, its room is
        raise
    beside.rename(folder)
    _sync(folder.parent)


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing when they died. No other process may be writing there."""
    for left in folder.glob(_beside(folder / "*").name):
        shutil.rmtree(left)


def size_of(*tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a checkpoint of these tensors takes, with room to spare for what comes with them."""
    return sum(t.numel() * t.element_size() for part in tensors for t in part.values()) + _OVERHEAD


@contextmanager
def needs_room(folder: Path, needed: int) -> Iterator[None]:
    """Raise ResourceError, naming free and needed bytes, before the block where they are not there, or if they run out.

    Another process may fill the disk meanwhile, and quotas do not show in its free space.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise _no_room(folder, free, needed)
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors says it in words
        if getattr(error, "errno", None) in _NO_ROOM or (number and int(number[1]) in _NO_ROOM):
            raise _no_room(folder, shutil.disk_usage(folder).free, needed) from error
        raise


def verify_checkpoint(folder: Path) -> None:
    """Raise IntegrityError unless the folder holds what was written and nothing else."""
    digests = _read_manifest(folder)
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(digests.keys() | there):
        path, expected = folder / name, digests.get(name, "not there")
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


def _beside(folder: Path) -> Path:
    """Where a checkpoint is written before it is renamed to its place."""
    return folder.with_name(f".{folder.name}.writing")


def _write(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], plain: Mapping[str, Any]) -> None:
    """All files, the manifest last, synced to disk."""
    for name, content in tensors.items():
        save_file({key: t.detach().contiguous().cpu() for key, t in content.items()}, folder / name)
    for name, value in plain.items():
        (folder / name).write_text(json.dumps(value, indent=2, allow_nan=False), encoding="utf-8")
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(_seal(digests), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _seal(digests: Any) -> str:
    return json.dumps(digests, indent=2)


def _read_manifest(folder: Path) -> dict[str, str]:
    """File name -> SHA-256. Written in one way only, so that no byte of it can change unnoticed."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        digests = json.loads(text)
        if not isinstance(digests, dict) or _seal(digests) != text:
            raise ValueError("it is not as it was written")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"has no readable manifest ({error})", str(folder), "delete the folder") from error
    return digests


def _no_room(folder: Path, free: int, needed: int) -> ResourceError:
    return ResourceError(
        f"the disk has no room: {free} bytes are free, about {needed} are needed",
        str(folder),
        "make room and run again: nothing that was written is lost",
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
