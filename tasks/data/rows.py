"""Rows out of JSON, CSV, Parquet and tab-separated files, one at a time; unreadable ones are named, not fatal."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import DataError, Problem

MAX_ROW = 1 << 20
"""Bytes. A longer line, or row of a CSV or Parquet file, is reported without being kept whole."""
MAX_FILE = 1 << 30
"""Bytes, unpacked. What is read is held in memory, so reading ends where a file turns out to have more."""
MAX_JSON = 1 << 26
"""Bytes of a .json file, which is parsed as a whole."""
_SHOWN = 20
_SAID = 200
"""Characters of one problem that are shown: it may quote what is in the file."""
_MIB = MAX_ROW >> 20
_SPLIT = "split the text, or leave the row out"

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass
class BadRows:
    """What is wrong in one file: everything counted, the first twenty problems kept for the message."""

    label: str
    shown: list[Problem] = field(default_factory=list)
    problems: int = 0
    rows: int = 0
    broken: bool = False
    """From some row on nothing could be read, so that leaving out bad rows would leave out good ones, too."""
    _last: int = 0

    def add(self, row: int, what: str, mend: str, column: str = "") -> None:
        self.problems += 1
        self.rows += row != self._last
        self._last = row
        if len(self.shown) < _SHOWN:
            said = what if len(what) <= _SAID else f"{what[:_SAID]}…"
            self.shown.append(Problem(said, ":".join(filter(None, (self.label, str(row), column))), mend))

    def settle(self, drop: bool) -> int:
        """How many rows are left out; raises DataError with all that is shown unless `drop` and the rest was read."""
        if self.rows and (self.broken or not drop):
            more = self.problems - len(self.shown)
            mend = "mend them, or leave such rows out with `bad_rows: drop` in params.yaml"
            if self.broken:
                mend = "mend them: what comes after the last one could not be read"
            rest = [
                Problem(f"{self.rows} bad rows" + (f", {more} problems not shown" if more else ""), self.label, mend)
            ]
            raise DataError([*self.shown, *rest])
        for problem in self.shown[:3]:
            log.warning("left out: %s", problem)
        return self.rows


def read_rows(
    path: Path, bad: BadRows, columns: Collection[str], json_columns: Collection[str] = (), comment: str = ""
) -> Iterator[tuple[int, Row]]:
    """(row number, fields) of a .jsonl, .jsonl.gz, .json, .csv or .parquet file; unreadable rows go to `bad`.

    Lines at the head of a CSV that begin with `comment` are passed over.

    Rows of Parquet and JSON and lines of the others count from 1, a CSV's header being line 1 and a row named by its
    last line.
    Of Parquet only `columns` are read. The cells of a CSV are text, but for `json_columns` (numbers, arrays). Memory is
    bounded by `MAX_ROW`. Raises DataError if the file is of another kind, too large, or cannot be read at all.
    """
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(path, bad)
        elif name.endswith(".json"):
            yield from objects(read_json(path, bad.label), bad)
        elif name.endswith(".csv"):
            yield from _csv(path, bad, json_columns, comment)
        elif name.endswith(".parquet"):
            yield from _parquet(path, bad, columns)
        else:
            raise DataError("is of no known kind", bad.label, "use .jsonl, .jsonl.gz, .json, .csv or .parquet")
    # The last: names of columns in Parquet that are not UTF-8.
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}"[:_SAID], bad.label, "write the file again") from error


def read_tabs(path: Path, columns: int, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a tab-separated file without quoting or header."""
    with path.open("rb") as file:
        for number, line in _decoded(file, bad):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == columns:
                yield number, cells
            else:
                bad.add(number, f"has {len(cells)} tab-separated cells", f"must have {columns}")


def read_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line that is not blank."""
    with path.open("rb") as file:
        yield from ((number, line.strip()) for number, line in _decoded(file, bad))


def parse_json(text: str) -> Any:
    """JSON to the letter: no NaN or Infinity, no key twice. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_json(path: Path, label: str) -> Any:
    """What a .json file holds. It is read as a whole: raises DataError where it is no JSON, or larger than 64 MiB."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise DataError(f"is {size >> 20} MiB of JSON, which is read as a whole", label, "write .jsonl, a row a line")
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"is not JSON: {error}"[:_SAID], label, "write the file again") from error


def objects(found: Any, bad: BadRows, column: str = "") -> Iterator[tuple[int, Row]]:
    """The objects of a JSON array with their numbers. Raises DataError where it is none."""
    if not isinstance(found, list):
        raise DataError(f"{column or 'the file'} is no JSON array", bad.label, "write a list of objects")
    for number, row in enumerate(found, 1):
        if isinstance(row, dict):
            yield number, row
        else:
            bad.add(number, f"is a JSON {type(row).__name__}", "write an object", column)


def _jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        for number, line in _decoded(file, bad):
            try:
                row = parse_json(line)
            except ValueError as error:
                bad.add(number, f"is not JSON: {error}", "write one JSON object a line")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                bad.add(number, f"is a JSON {type(row).__name__}", "write one JSON object a line")


def _csv(path: Path, bad: BadRows, json_columns: Collection[str], comment: str) -> Iterator[tuple[int, Row]]:
    number = size = 0
    spoilt, head = False, bool(comment)

    def lines(file: IO[bytes]) -> Iterator[str]:
        """Every line: to leave one out could join two rows."""
        nonlocal number, size, spoilt, head
        for number, line in _lines(file, bad):
            if (size := size + len(line)) > MAX_ROW:
                raise csv.Error(f"a row longer than {_MIB} MiB, or a quote that is never closed")
            text = _text(line, number, bad)
            if head := head and text is not None and text.startswith(comment):
                continue
            spoilt |= text is None
            yield line.decode("utf-8", "replace") if text is None else text

    csv.field_size_limit(MAX_ROW)
    with path.open("rb") as file:
        reader = csv.DictReader(lines(file), strict=True)
        try:
            _refuse_twice(reader.fieldnames or (), bad.label)
            size, spoilt = 0, False
            for row in reader:
                if spoilt:
                    pass  # reported already
                elif None in row or None in row.values():
                    bad.add(number, "has not as many cells as the header", "quote text that holds commas or newlines")
                else:
                    yield number, {key: _cell(key, value, json_columns) for key, value in row.items() if value}
                size, spoilt = 0, False
        except csv.Error as error:
            # Where quoting is broken, no later row can be told from the one before it.
            bad.add(number, f"is not CSV: {error}", "quote text that holds commas, and double the quotes inside it")
            bad.broken = True


def _parquet(path: Path, bad: BadRows, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    number = size = 0
    file = pq.ParquetFile(path, buffer_size=MAX_ROW, pre_buffer=False)  # or it would hold a whole row group, packed
    found = [name for name in file.schema_arrow.names if name in columns]
    _refuse_twice(found, bad.label)
    # Few rows at a time: a value that is stored once may stand in all of them.
    for batch in file.iter_batches(batch_size=64, columns=found):
        size += batch.nbytes
        _refuse_large(size, bad.label)
        for i in range(batch.num_rows):
            number += 1
            if batch.slice(i, 1).nbytes > MAX_ROW:
                bad.add(number, f"is longer than {_MIB} MiB", _SPLIT)
            elif (row := _values(batch, i, number, bad)) is not None:
                yield number, row


def _values(batch: pa.RecordBatch, i: int, number: int, bad: BadRows) -> Row | None:
    """Row `i` without its nulls; None, and reported, where Python cannot hold what is in it."""
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError as error:
            bad.add(number, f"is not UTF-8: {error}", "write the text again as UTF-8", name)
            return None
        except (ValueError, OverflowError) as error:  # dates beyond the year 9999, a struct with two fields of a name
            bad.add(number, f"cannot be read: {error}", "write the column with another type", name)
            return None
    return {name: value for name, value in row.items() if value is not None}


def _decoded(file: IO[bytes], bad: BadRows) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, blank ones left out; those too long or not UTF-8 go to `bad`."""
    for number, line in _lines(file, bad):
        if len(line) > MAX_ROW:
            bad.add(number, f"is longer than {_MIB} MiB", _SPLIT)
        elif (text := _text(line, number, bad)) is not None and text.strip():
            yield number, text


def _lines(file: IO[bytes], bad: BadRows) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long, the first MAX_ROW + 1 bytes."""
    number = size = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        size += len(line)
        rest = line
        while len(rest) >= MAX_ROW and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW)
            size += len(rest)
            _refuse_large(size, bad.label)
        _refuse_large(size, bad.label)
        yield number, line


def _text(line: bytes, number: int, bad: BadRows) -> str | None:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad.add(number, f"is not UTF-8: {error.reason} at byte {error.start + 1}", "save the file as UTF-8")
        return None


def _refuse_large(size: int, label: str) -> None:
    if size > MAX_FILE:
        what = f"holds more than {MAX_FILE >> 30} GiB of text, which is read into memory"
        raise DataError(what, label, "set max_rows in params.yaml, or split the file")


def _refuse_twice(names: Sequence[str], label: str) -> None:
    if twice := _twice(names):
        raise DataError(f"has two columns named {twice!r}", label, "rename or remove one")


def _cell(column: str, text: str, json_columns: Collection[str]) -> Any:
    if column not in json_columns:
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text  # of the wrong type then, which the schema says with row and field


def _once(pairs: list[tuple[str, Any]]) -> Row:
    if twice := _twice([key for key, _ in pairs]):
        raise ValueError(f"the key {twice!r} stands there twice")
    return dict(pairs)


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
