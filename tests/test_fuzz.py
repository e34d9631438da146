"""Whatever is put before the loaders: valid rows, or an error that says where and what to do. Never another exception.

Seeded, so that a run repeats the last one; for a search, raise `max_examples` and drop `derandomize`.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.formats import Preference, RatedText, read_feedback, read_rated_tables
from tasks.data.rows import BadRows
from tasks.errors import ConfigError, Problem, ProximalError
from tasks.params import check_params, dump_params, load_params

FORMATS = ("preferences", "messages", "hh", "ratings")
steadily = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Seen = Callable[[str], None]


def sound(item: Preference | RatedText) -> bool:
    """What every row that is let through may be relied on for."""
    if isinstance(item, RatedText):
        return bool(item.text.strip()) and bool(item.ratings) and math.isfinite(item.mean)
    texts = [item.prompt, item.chosen, item.rejected]
    "".join(texts).encode()  # a lone surrogate would raise
    turns = json.loads(item.prompt) if item.format == "chat" else []
    return (
        bool(item.chosen.strip())
        and bool(item.rejected.strip())
        and item.chosen.strip() != item.rejected.strip()
        and "\0" not in "".join(texts)
        and 0 <= item.margin < math.inf
        and 0 <= item.target <= 1
        and all(turn["role"] in ("system", "user", "assistant") for turn in turns)
    )


def read(path: Path, form: str) -> list[Preference | RatedText]:
    """The rows; a file that is refused says where and what to do of each problem."""
    bad = BadRows(path.name)
    found: list[Preference | RatedText] = []
    said = [*problems(lambda: found.extend(read_feedback(path, form, bad))), *problems(lambda: bad.settle(drop=False))]
    assert all(problem.where.startswith(path.name) and problem.mend for problem in said)
    assert all(map(sound, found))
    return found


def problems(work: Callable[[], object]) -> Sequence[Problem]:
    """What an error for people says; every other error fails the test."""
    try:
        work()
    except ProximalError as error:
        return error.problems
    return ()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def put(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    """A copy of `value` with something else in one place."""
    value = node = copy.deepcopy(value)
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = other
    return value


# Rows

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\0", " ", "\n\nHuman: a\n\nAssistant: b", "user", "assistant", 10**400, 1e308])
)
messages = st.lists(st.fixed_dictionaries({}, optional={"role": scalars, "content": scalars}) | scalars, max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
fields = {name: scalars | messages | values for name in ("prompt", "chosen", "rejected", "text", "ratings")}
rows = st.fixed_dictionaries({}, optional=fields | {"margin": scalars, "target": scalars}) | values


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
GOOD: dict[str, dict[str, Any]] = {
    "preferences": {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1, "target": 0.5},
    "messages": {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}], "margin": 1},
    "hh": {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
    "ratings": {"text": "a", "ratings": [1, 2]},
}


@pytest.mark.fault("fuzz: any bytes as JSONL, CSV, Parquet", expected="valid rows, or where and mend")
@steadily
@given(
    content=st.binary(max_size=200), form=st.sampled_from(FORMATS), kind=st.sampled_from(["jsonl", "csv", "parquet"])
)
def test_any_bytes(tmp_path: Path, content: bytes, form: str, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content)
    read(path, form)


@pytest.mark.fault("fuzz: any JSON as rows", expected="valid rows, or where and mend")
@steadily
@given(lines=st.lists(rows, max_size=4), form=st.sampled_from(FORMATS))
def test_any_json(tmp_path: Path, lines: list[Any], form: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = read(path, form)
    assert all(1 <= item.row <= len(lines) for item in found)


@pytest.mark.fault("fuzz: any value anywhere in a row", expected="valid rows, or where and mend")
@steadily
@given(st.data(), st.sampled_from(FORMATS), st.sampled_from(["\ud800", "a\0", " ", 1e308, -1]) | scalars | values)
def test_any_value_in_a_row(tmp_path: Path, data: st.DataObject, form: str, value: Any) -> None:
    path = tmp_path / "x.jsonl"
    row = put(GOOD[form], data.draw(st.sampled_from([place for place in places(GOOD[form]) if place])), value)
    path.write_text(json.dumps(GOOD[form]) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert read(path, form)


@pytest.mark.fault("fuzz: any cells as CSV", expected="valid rows, or where and mend")
@steadily
@given(
    text=st.text(alphabet=st.sampled_from('ab ",\n\r\0é[1]{}'), max_size=60),
    header=st.sampled_from(["chosen,rejected", "prompt,chosen,rejected,margin", "text,ratings", "chosen,chosen", '"'])
    | st.text(max_size=10),
)
def test_any_cells(tmp_path: Path, text: str, header: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(f"{header}\n{text}".encode("utf-8", "surrogatepass"))
    for form in FORMATS:
        read(path, form)


@pytest.mark.fault("fuzz: any text as rated tables", expected="valid rows, or where and mend")
@steadily
@given(*[st.text(alphabet=st.sampled_from("12\t\n[],a\0é.N"), max_size=40)] * 2)
def test_any_tables(tmp_path: Path, texts: str, ratings: str) -> None:
    (tmp_path / "texts").write_text(texts, encoding="utf-8")
    (tmp_path / "ratings").write_text(ratings, encoding="utf-8")
    bad, others = BadRows("texts"), BadRows("ratings")
    found = list(read_rated_tables(tmp_path / "texts", bad, tmp_path / "ratings", others))
    assert all(map(sound, found))
    assert all(problem.mend for problem in [*bad.shown, *others.shown])


def written() -> Iterator[tuple[str, str, bytes]]:
    """Good files of each kind: format, ending, content."""
    turns = [[{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "x"}] for i in range(20)]
    other = [[*conversation[:1], {"role": "assistant", "content": "y"}] for conversation in turns]
    tables = {
        "preferences": {"chosen": [f"good {i}" for i in range(20)], "rejected": ["bad"] * 20, "margin": [1.5] * 20},
        "messages": {"chosen": turns, "rejected": other},
        "ratings": {"text": [f"text {i}" for i in range(20)], "ratings": [[1.0, 2.0]] * 20},
    }
    for form, columns in tables.items():
        table = pa.table(columns)
        for compression in ("snappy", "none"):
            pq.write_table(table, sink := pa.BufferOutputStream(), compression=compression)
            yield form, "parquet", sink.getvalue().to_pybytes()
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
        yield form, "jsonl", lines
        yield form, "jsonl.gz", gzip.compress(lines, mtime=0)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, or the end cut off."""
    broken = bytearray(content[: draw.randrange(len(content) + 1)] if draw.random() < 0.2 else content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if broken:
            broken[draw.randrange(len(broken))] = draw.randrange(256)
    return bytes(broken)


@pytest.mark.fault("fuzz: 1,500 damaged data files", expected="valid rows, or where and mend")
def test_damaged_files(tmp_path: Path, seen: Seen) -> None:
    draw, files = random.Random(5), list(written())
    for form, kind, content in files:
        (tmp_path / f"x.{kind}").write_bytes(content)
        assert len(read(tmp_path / f"x.{kind}", form)) == 20
    whole = 0
    for _ in range(1500):
        form, kind, content = draw.choice(files)
        (tmp_path / f"x.{kind}").write_bytes(damaged(content, draw))
        whole += len(read(tmp_path / f"x.{kind}", form)) == 20
    assert whole < 500  # a changed letter is a text like any other
    seen(f"{1500 - whole} refused or cut short, {whole} with another letter, none crashed")


# Parameters


PARAMS = dump_params(check_params(tiny.tiny_params()))
FILE = "seed: 5\ningest: {policy: {source: 'file:a'}, judge: {source: 'file:b'}, data: []}\n"
PLACES = [path for path in places(PARAMS) if path]


@pytest.mark.fault(
    "fuzz: any value anywhere in params.yaml", expected="params that come back the same, or path and why"
)
@steadily
@given(
    place=st.sampled_from(PLACES),
    value=values | st.integers(-2, 2) | st.sampled_from([math.nan, math.inf, -0.0, "1e-5"]),
)
def test_any_value_anywhere(place: tuple[Any, ...], value: Any) -> None:
    raw = put(PARAMS, place, value)
    if said := problems(lambda: check_params(raw, "params.yaml")):
        assert all(problem.where.startswith("params.yaml:") and len(str(problem)) < 1000 for problem in said)
        return
    params = check_params(raw)
    assert check_params(json.loads(json.dumps(dump_params(params), allow_nan=False))) == params


@pytest.mark.fault("fuzz: any text as params.yaml or --set", expected="params, or path and why")
@steadily
@given(
    text=st.text(alphabet=st.sampled_from("seed:ingt \n-[]{}&*!|>'\"#%@`,?01.é\0"), max_size=60),
    override=st.text(alphabet=st.sampled_from("seding.=[]{}:1\n "), max_size=20)
    | st.sampled_from(["seed=2001-99-99", "seed=!!int x", "seed=1" + "0" * 5000, "=", "a=&a [*a]"]),
)
def test_any_text(tmp_path: Path, text: str, override: str) -> None:
    path = tmp_path / "params.yaml"
    for content in (text, f"{text}\n{FILE}"):
        path.write_text(content, encoding="utf-8")
        assert all(problem.where for problem in problems(lambda: load_params(path, [override])))


@pytest.mark.fault("fuzz: params.yaml nested without end", expected="exit 2")
@pytest.mark.parametrize("text", ["[" * 1200, "{a: " * 1200])
def test_nesting_without_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.fault("fuzz: YAML aliases that unfold to 10^9 values", expected="exit 2 at once")
@pytest.mark.timeout(60)
def test_aliases_do_not_unfold(tmp_path: Path) -> None:
    lines = ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    (tmp_path / "params.yaml").write_text(f"ingest: [{', '.join(lines)}]\n")
    with pytest.raises(ConfigError, match="ingest") as caught:
        load_params(tmp_path / "params.yaml")
    assert len(str(caught.value)) < 200_000


# Models and checkpoints
