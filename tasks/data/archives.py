"""Take single files out of wheels and source distributions, to places that no name inside an archive decides."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from tasks.errors import DataError


class Archive(Protocol):
    """Files by name, links and devices left out."""

    def names(self) -> list[str]: ...
    def open(self, name: str) -> IO[bytes]: ...


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def names(self) -> list[str]:
        return [info.filename for info in self.archive.infolist() if not info.is_dir()]

    def open(self, name: str) -> IO[bytes]:
        return self.archive.open(name)


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self.members = {member.name: member for member in archive.getmembers() if member.isfile()}
        self.archive = archive

    def names(self) -> list[str]:
        return list(self.members)

    def open(self, name: str) -> IO[bytes]:
        file = self.archive.extractfile(self.members[name])
        assert file is not None, "only regular files are listed"
        return file


def extract(archive: Path, inside: str, target: Path) -> Path:
    """Copy the file or folder `inside` an archive into the folder `target`, and return where it lies now.

    `outer.tar.gz!inner.txt` looks into an archive inside the archive. The top folder of a source distribution
    (`NAME-VERSION/`) is left out of the names. Raises DataError.
    """
    outer, _, inner = inside.partition("!")
    try:
        with _opened(archive) as opened:
            found = _copy(opened, archive.name, outer, target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"cannot be read as an archive: {error}", archive.name, "fetch it again") from error
    return extract(found, inner, target / "inner") if inner else found


@contextmanager
def _opened(path: Path) -> Iterator[Archive]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _Zip(archive)
    else:
        with tarfile.open(path) as tar:
            yield _Tar(tar)


def _copy(archive: Archive, label: str, inside: str, target: Path) -> Path:
    """Copy what `inside` names: one file, or all files below a folder; below the top one if it is empty."""
    names = {_plain(name, archive): name for name in archive.names()}
    wanted = inside.strip("/")
    chosen = [name for name in names if not wanted or name == wanted or name.startswith(f"{wanted}/")]
    if not chosen:
        near = sorted(name for name in names if PurePosixPath(name).name == PurePosixPath(wanted).name)
        raise DataError(
            f"holds no {inside}", label, f"did you mean {near[0]}?" if near else "check `file` in params.yaml"
        )
    root = target / PurePosixPath(wanted).name
    for name in chosen:
        relative = PurePosixPath(name.removeprefix(wanted).lstrip("/"))
        if ".." in relative.parts:
            raise DataError(f"names a file outside itself: {name}", label, "do not use this archive")
        place = root.joinpath(*relative.parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(names[name]) as source, place.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    return root


def _plain(name: str, archive: Archive) -> str:
    """The name without a source distribution's one top folder."""
    top, _, rest = name.partition("/")
    return rest if isinstance(archive, _Tar) and f"{top}/PKG-INFO" in archive.members else name
