"""Rows out of JSONL, CSV, Parquet and tab-separated files, one at a time; unreadable ones are named, not fatal."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import DataError, Problem

MAX_LINE = 1 << 20
"""Bytes. A longer line is reported without being read whole."""
_SHOWN = 20

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass
class BadRows:
    """What is wrong in one file: everything counted, the first twenty problems kept for the message."""

    label: str
    shown: list[Problem] = field(default_factory=list)
    problems: int = 0
    rows: int = 0
    _last: int = 0

    def add(self, row: int, what: str, mend: str, column: str = "") -> None:
        self.problems += 1
        self.rows += row != self._last
        self._last = row
        if len(self.shown) < _SHOWN:
            self.shown.append(Problem(what, ":".join(filter(None, (self.label, str(row), column))), mend))

    def settle(self, drop: bool) -> int:
        """How many rows are left out; raises DataError with all that is shown unless `drop`."""
        if self.rows and not drop:
            more = self.problems - len(self.shown)
            mend = "mend them, or leave such rows out with `bad_rows: drop` in params.yaml"
            rest = [
                Problem(f"{self.rows} bad rows" + (f", {more} problems not shown" if more else ""), self.label, mend)
            ]
            raise DataError([*self.shown, *rest])
        for problem in self.shown[:3]:
            log.warning("left out: %s", problem)
        return self.rows


def read_rows(path: Path, bad: BadRows, json_columns: Collection[str] = ()) -> Iterator[tuple[int, Row]]:
    """(row number, fields) of a .jsonl, .jsonl.gz, .csv or .parquet file; unreadable rows go to `bad`.

    Rows of Parquet and lines of the others count from 1, a CSV's header being line 1 and a row named by its last line.
    The cells of a CSV are text, but for `json_columns` (numbers, arrays). Memory is bounded by `MAX_LINE`.
    Raises DataError if the file is of another kind or cannot be read at all.
    """
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(path, bad)
        elif name.endswith(".csv"):
            yield from _csv(path, bad, json_columns)
        elif name.endswith(".parquet"):
            yield from _parquet(path, bad)
        else:
            raise DataError("is of no known kind", bad.label, "use .jsonl, .jsonl.gz, .csv or .parquet")
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", bad.label, "write the file again") from error


def read_tabs(path: Path, columns: int, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a tab-separated file without quoting or header."""
    with path.open("rb") as file:
        for number, line in _lines(file, bad):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == columns:
                yield number, cells
            else:
                bad.add(number, f"has {len(cells)} tab-separated cells", f"must have {columns}")


def parse_json(text: str) -> Any:
    """JSON to the letter: no NaN or Infinity, no key twice. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        for number, line in _lines(file, bad):
            try:
                row = parse_json(line)
            except ValueError as error:
                bad.add(number, f"is not JSON: {error}", "write one JSON object a line")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                bad.add(number, f"is a JSON {type(row).__name__}", "write one JSON object a line")


def _csv(path: Path, bad: BadRows, json_columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    number = 0

    def lines(file: IO[bytes]) -> Iterator[str]:
        nonlocal number
        for number, line in _lines(file, bad, blanks=True):  # noqa: B007, the reader below asks for it
            yield line

    csv.field_size_limit(MAX_LINE)
    with path.open("rb") as file:
        reader = csv.DictReader(lines(file), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    bad.add(number, "has not as many cells as the header", "quote text that holds commas or newlines")
                else:
                    yield number, {key: _cell(key, value, json_columns) for key, value in row.items() if value}
        except csv.Error as error:
            # Where quoting is broken, no later row can be told from the one before it.
            bad.add(number, f"is not CSV: {error}", "quote text that holds commas, and double the quotes inside it")


def _parquet(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
        for i in range(batch.num_rows):
            number += 1
            try:
                row = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                bad.add(number, f"is not UTF-8: {error}", "write the text again as UTF-8")
                continue
            yield number, {name: value for name, value in row.items() if value is not None}


def _lines(file: IO[bytes], bad: BadRows, blanks: bool = False) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, blank ones left out unless asked for."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
            bad.add(number, f"is longer than {MAX_LINE >> 20} MiB", "split the text, or leave the row out")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad.add(number, f"is not UTF-8: {error.reason} at byte {error.start + 1}", "save the file as UTF-8")
            continue
        if blanks or text.strip():
            yield number, text


def _cell(column: str, text: str, json_columns: Collection[str]) -> Any:
    if column not in json_columns:
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text  # of the wrong type then, which the schema says with row and field


def _once(pairs: list[tuple[str, Any]]) -> Row:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"the key {min(twice)!r} stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
