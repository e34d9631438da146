"""Faults of files, by size and by path: named in bounded memory, refused with their target."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from ingested import FINE, csv, ingest, jsonl, outputs, parquet

from tasks.data import rows
from tasks.data.formats import read_feedback
from tasks.workspace import Workspace

pytest_plugins = ["ingested"]

Seen = Callable[[str], None]


PEAK = """
import sys
from pathlib import Path
from tasks.errors import DataError
from tasks.data.formats import read_feedback
from tasks.data.rows import BadRows

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

before, bad = peak(), BadRows("x")
read = sum(1 for _ in read_feedback(Path(sys.argv[1]), "preferences", bad))
print(read, bad.rows, peak() - before, bad.shown[0].what)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "mib"),
    [
        pytest.param(name, mib, marks=[pytest.mark.fault(f"27: {fault}", expected="named; memory bounded"), *slow])
        for fault, name, mib, slow in (
            ("a line of 50 MB", "x.jsonl", 32, []),
            ("a cell of 50 MB in CSV", "x.csv", 32, []),
            ("a line of 200 MB, packed", "x.jsonl.gz", 32, [pytest.mark.fault_slow]),
            ("a cell of 50 MB in Parquet", "x.parquet", 400, [pytest.mark.fault_slow]),
        )
    ],
)
def test_what_is_huge_is_named_in_bounded_memory(tmp_path: Path, name: str, mib: int, seen: Seen) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        table = {key: [row[key] for row in FINE] for key in FINE[0]}
        pq.write_table(pa.table(table | {"chosen": [*table["chosen"][:-1], "y" * 50_000_000]}), path)
    else:
        size = 200 if name.endswith(".gz") else 50
        with gzip.open(path, "wb", 1) if name.endswith(".gz") else path.open("wb") as file:
            file.write(b"prompt,chosen,rejected\n" if name == "x.csv" else jsonl())
            for _ in range(size):
                file.write(b"y" * 1_000_000)
            file.write(b"\n")
    told = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        env={**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    read, bad, grown, what = told.stdout.split(" ", 3)
    assert (int(read), int(bad)) == ({"x.csv": 0, "x.parquet": 39}.get(name, 40), 1)
    assert "longer than 1 MiB" in what
    assert int(grown) < mib
    seen(f"named; {grown} MiB more at peak")


@pytest.mark.fault("27: a file of more text than is to be held in memory", expected="exit 3 before it is read whole")
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"])
def test_a_file_too_large_ends_the_reading(
    made: Workspace, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    content = {
        "x.jsonl": jsonl(*FINE * 100),
        "x.jsonl.gz": gzip.compress(jsonl(*FINE * 100)),
        "x.csv": csv(b"q,a,b\n" * 4000),
        "x.parquet": parquet(),
    }[name]
    monkeypatch.setattr(rows, "MAX_FILE", 1000)
    assert ingest(made, name, content) == 3
    assert (
        "of text, which is read into memory — set max_rows in params.yaml, or split the file" in capsys.readouterr().err
    )
    read = []
    with pytest.raises(rows.DataError):
        read.extend(row.row for row in read_feedback(made.own_data / name, "preferences", rows.BadRows(name)))
    monkeypatch.undo()
    if name != "x.parquet":  # whose forty rows come in one piece
        assert ingest(made, name, None, max_rows=40) == 0
    seen("exit 3")


@pytest.mark.fault("27: an object of 60,000 keys", expected="read at once")
@pytest.mark.timeout(60)
def test_many_keys_take_no_time(made: Workspace, capsys: pytest.CaptureFixture[str], seen: Seen) -> None:
    assert ingest(made, "x.jsonl", jsonl({str(i): 0 for i in range(60_000)})) == 3
    assert "41:chosen — Field required" in capsys.readouterr().err
    seen("exit 3 at once (quadratic time before: 87 s)")


def link_to_file(own: Path, outside: Path) -> str:
    (own / "link.jsonl").symlink_to(outside)
    return "link.jsonl"


def link_to_folder(own: Path, outside: Path) -> str:
    (own / "x").symlink_to(outside.parent)
    return f"x/{outside.name}"


def climbing(own: Path, outside: Path) -> str:
    return os.path.relpath(outside, own)


def absolute(own: Path, outside: Path) -> str:
    return str(outside)


def own_folder_is_a_link(own: Path, outside: Path) -> str:
    shutil.move(own, outside.parent / "elsewhere")
    own.symlink_to(outside.parent / "elsewhere")
    shutil.copy(outside, own / "x.jsonl")
    return "x.jsonl"


@pytest.mark.parametrize(
    "lead_out",
    [
        pytest.param(how, marks=pytest.mark.fault("29: a path that leads out", expected="exit 3, the target"))
        for how in (link_to_file, link_to_folder, climbing, absolute, own_folder_is_a_link)
    ],
)
def test_paths_that_leave_the_workspace_are_refused_with_their_target(
    used: Workspace, tmp_path: Path, lead_out: Any, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    (tmp_path / "out").mkdir()
    outside = tmp_path / "out" / "outside.jsonl"
    outside.write_bytes(jsonl())
    before = outputs(used)
    name = lead_out(used.own_data, outside)
    assert ingest(used, name, None) == 3
    message = capsys.readouterr().err
    assert "leads out of data/own, to" in message
    assert str(tmp_path / "out") in message
    assert outputs(used) == before
    seen("exit 3")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=pytest.mark.fault("29: a pipe, circle or folder as file", expected="exit 3"))
        for make in (pipe, circle, folder)
    ],
)
def test_what_is_no_file_is_refused(used: Workspace, make: Any, capsys: pytest.CaptureFixture[str], seen: Seen) -> None:
    make(used.own_data / "odd.jsonl")
    assert ingest(used, "odd.jsonl", None) == 3
    assert "data/own/odd.jsonl — " in capsys.readouterr().err
    seen("exit 3")
