"""Fetch one file of a release from the package index that pip is configured for, without running anything in it.

`pip download` would do for wheels, but it runs the setup.py of a source distribution to learn its metadata. So pip is
asked for its settings only, and the files are found through the simple repository API (PEP 503).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

import requests
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from tasks.addresses import public_uri
from tasks.errors import DataError, ServiceError

PIPS_DEFAULT = "https://pypi.org/simple"
_CHUNK = 1 << 20
_MEND = "check the network and pip's settings (`pip config list`), then run again"


@dataclass(frozen=True)
class Link:
    """A file that an index offers."""

    url: str
    sha256: str
    """As the index states it; empty if it does not."""

    @property
    def filename(self) -> str:
        return unquote(urlsplit(self.url).path.rsplit("/", 1)[-1])


class PackageIndex:
    """The indexes and link pages that pip would look at, reached the way pip would reach them."""

    def __init__(self) -> None:
        self.settings = pip_settings()
        self.session = requests.Session()
        retry = Retry(total=2, backoff_factor=0.5, status_forcelist=(500, 502, 503, 504), raise_on_status=False)
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))
        if proxy := self.settings.get("proxy"):
            self.session.proxies = {"http": proxy, "https": proxy}
        self.session.cert = self.settings.get("client-cert")

    def find(self, name: str, version: str, kind: str, sha256: str) -> Link:
        """The wheel or sdist of a release that has this digest.

        Raises DataError if there is none, or only others; ServiceError if an index that might have it does not answer.
        """
        links, silent = self._links(name)
        offered = [link for link in links if _is(link.filename, name, version, kind)]
        for link in sorted(offered, key=lambda link: not link.sha256):
            if link.sha256 in (sha256, ""):
                return link
        if silent:
            raise ServiceError("; ".join(silent), f"package index, looking for {name}", _MEND)
        release = f"{name}=={version}"
        if offered:
            found = ", ".join(sorted({link.sha256 for link in offered}))
            what = f"the {kind} has changed: expected sha256 {sha256}, the index offers {found}"
            raise DataError(what, release, "find out why before you pin another digest in params.yaml")
        what = f"the package index has no {kind} of it"
        raise DataError(what, release, "check name, version and `distribution` in params.yaml")

    def download(self, link: Link, target: Path) -> None:
        """Write the file to `target`, showing progress. Raises ServiceError."""
        if urlsplit(link.url).scheme == "file":
            target.write_bytes(_local(link.url).read_bytes())
            return
        try:
            with self._get(link.url, stream=True) as answer, target.open("wb") as file:
                answer.raise_for_status()
                size = int(answer.headers.get("content-length", 0)) or None
                with tqdm(total=size, unit="B", unit_scale=True, desc=link.filename, disable=None) as bar:
                    for chunk in answer.iter_content(_CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
        except requests.RequestException as error:
            raise ServiceError(f"the download broke off: {_cause(error)}", link.filename, _MEND) from error

    def _links(self, name: str) -> tuple[list[Link], list[str]]:
        """Links on every page for this project, and the pages that do not answer, with why."""
        links: list[Link] = []
        silent = []
        for page in self._pages(name):
            try:
                links += self._read(page)
            except requests.RequestException as error:
                silent.append(f"{public_uri(page)} does not answer ({_cause(error)})")
        return links, silent

    def _pages(self, name: str) -> list[str]:
        indexes = [self.settings.get("index-url", PIPS_DEFAULT), *self.settings.get("extra-index-url", "").split()]
        if self.settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            indexes = []
        pages = [f"{index.rstrip('/')}/{canonicalize_name(name)}/" for index in indexes]
        return pages + [_as_url(place) for place in self.settings.get("find-links", "").split()]

    def _read(self, page: str) -> list[Link]:
        if urlsplit(page).scheme == "file":
            folder = _local(page)
            listing = folder / "index.html" if folder.is_dir() else folder
            if listing.is_file():
                return _parse(listing.read_text(encoding="utf-8"), page)
            return [Link(file.as_uri(), "") for file in sorted(folder.glob("*"))]
        answer = self._get(page, headers={"Accept": "text/html"})
        if answer.status_code == requests.codes.not_found:
            return []
        answer.raise_for_status()
        return _parse(answer.text, answer.url)

    def _get(self, url: str, **options: object) -> requests.Response:
        trusted = urlsplit(url).hostname in self.settings.get("trusted-host", "").split()
        timeout = float(self.settings.get("timeout", self.settings.get("default-timeout", 15)))
        verify = False if trusted else self.settings.get("cert")
        return self.session.get(url, timeout=(min(timeout, 10), timeout), verify=verify, **options)  # type: ignore[arg-type]


def pip_settings() -> dict[str, str]:
    """What pip is configured to use: its environment variables before its files, `download.` before `global.`."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise ServiceError(f"pip does not tell its settings: {listed.stderr.strip()}", mend="install pip")
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in listed.stdout.splitlines()]
    for section in ("global.", "download.", ":env:."):
        settings |= {
            key.removeprefix(section): str(ast.literal_eval(value))
            for key, _, value in lines
            if key.startswith(section)
        }
    return settings


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _parse(html: str, base: str) -> list[Link]:
    anchors = _Anchors()
    anchors.feed(html)
    parted = [urldefrag(urljoin(base, href)) for href in anchors.hrefs]
    return [Link(url, fragment.removeprefix("sha256=") if "sha256=" in fragment else "") for url, fragment in parted]


def _is(filename: str, name: str, version: str, kind: str) -> bool:
    try:
        parsed = parse_wheel_filename(filename) if kind == "wheel" else parse_sdist_filename(filename)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return False
    return parsed[0] == canonicalize_name(name) and parsed[1] == Version(version)


def _as_url(place: str) -> str:
    return place if "://" in place else Path(place).expanduser().absolute().as_uri() + "/"


def _local(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))


def _cause(error: requests.RequestException) -> str:
    """The kind of failure. The full text of some repeats the URL with its credentials."""
    status = error.response.status_code if error.response is not None else None
    return f"HTTP {status}" if status else type(error).__name__
