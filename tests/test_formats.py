"""tasks.data.formats and rows: what each format becomes, and that every bad row is named by file, row and field."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.formats import Preference, RatedText, read_feedback, read_rated_tables
from tasks.data.rows import MAX_ROW, BadRows
from tasks.errors import DataError

PAIR = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}


def jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path, format="preferences"):
    """The rows, refusing bad ones."""
    bad = BadRows(path.name)
    rows = list(read_feedback(path, format, bad))
    bad.settle(drop=False)
    return rows


def problems(path, format="preferences"):
    """`row:field — what` of each problem."""
    with pytest.raises(DataError) as caught:
        read(path, format)
    shown = caught.value.problems[:-1]
    assert all(problem.mend for problem in shown)
    return [f"{problem.where.removeprefix(path.name + ':')} {problem.what}" for problem in shown]


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


# What the formats become


def test_preferences_with_and_without_prompt_margin_and_target(tmp_path):
    file = jsonl(
        tmp_path / "own.jsonl",
        {**PAIR, "margin": 2, "target": 0.75, "id": 7},
        {"chosen": " a", "rejected": "b"},
        {**PAIR, "prompt": turns("Say hello.")},
        {**PAIR, "prompt": None, "margin": None},
    )
    assert read(file) == [
        Preference("text", "Say hello.", "Hello!", "No.", 2.0, 0.75, 1),
        Preference("text", "", " a", "b", 1.0, 1.0, 2),
        Preference("chat", '[{"role": "user", "content": "Say hello."}]', "Hello!", "No.", 1.0, 1.0, 3),
        Preference("text", "", "Hello!", "No.", 1.0, 1.0, 4),
    ]


def test_messages_have_their_common_beginning_as_prompt(tmp_path):
    begin = turns("Hi", "Hello", "How are you?")
    reply = {"chosen": [*begin, turns("", "Well, and you?")[1]], "rejected": [*begin, turns("", "Go away")[1]]}
    split = {"prompt": begin, "chosen": reply["chosen"][-1:], "rejected": reply["rejected"][-1:]}
    first, second = read(jsonl(tmp_path / "own.jsonl", reply, split), "messages")
    assert (first.chosen, first.rejected) == ("Well, and you?", "Go away")
    assert json.loads(first.prompt) == begin
    assert second == Preference("chat", first.prompt, first.chosen, first.rejected, 1.0, 1.0, 2)


def test_hh_turns_become_messages(tmp_path):
    begin = "\n\nHuman: Is it: good?\n\nHere it is.\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant: "
    (row,) = read(jsonl(tmp_path / "hh.jsonl", {"chosen": begin + "It moved me.", "rejected": begin + "Dunno"}), "hh")
    assert json.loads(row.prompt) == turns("Is it: good?\n\nHere it is.", "Yes.", "Why?")
    assert (row.format, row.chosen, row.rejected) == ("chat", "It moved me.", "Dunno")


def test_ratings(tmp_path):
    assert read(jsonl(tmp_path / "own.jsonl", {"text": " Fine. ", "ratings": [1, 2.5]}), "ratings") == [
        RatedText("Fine.", (1.0, 2.5), 1)
    ]


def test_csv_parquet_and_gzip_read_the_same_as_jsonl(tmp_path):
    rows = [{"text": 'He said, "go\non"', "ratings": [1, -2]}, {"text": "plain", "ratings": [0.5]}]
    expected = [(row["text"], tuple(row["ratings"])) for row in rows]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "ratings"])
        writer.writerows([row["text"], json.dumps(row["ratings"])] for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("a.csv", "a.parquet", "a.jsonl.gz"):
        assert [(row.text, row.ratings) for row in read(tmp_path / name, "ratings")] == expected, name


def test_numbers_of_a_csv_are_numbers_and_its_text_stays_text(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("prompt,chosen,rejected,margin,target\n,12,[1],1.5,\nx,a,b,,0.5\n", encoding="utf-8")
    assert read(file) == [
        Preference("text", "", "12", "[1]", 1.5, 1.0, 2),
        Preference("text", "x", "a", "b", 1.0, 0.5, 3),
    ]


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\n" + json.dumps(PAIR).encode())
    assert [row.row for row in read(file)] == [1, 3]


def test_rated_tables_are_joined_by_id(tmp_path):
    texts, ratings = tmp_path / "texts.txt", tmp_path / "ratings.txt"
    texts.write_bytes('\ufeff1\t0.5\tCafé "noir"\r\n9\t1\tno ratings\r\nbroken\r\n2\t3\tx\r\n3\t0\ty\r\n'.encode())
    ratings.write_text("2\t3\t0\t[3]\n1\t0.5\t0.7\t[0, 1]\n3\t0\t0\t[0, NaN]\n4\t0\t0\t[]\n", encoding="utf-8")
    bad, bad_ratings = BadRows("texts"), BadRows("ratings")
    rows = list(read_rated_tables(texts, bad, ratings, bad_ratings))
    assert rows == [RatedText('Café "noir"', (0.0, 1.0), 1), RatedText("x", (3.0,), 4)]
    assert [problem.where for problem in bad.shown] == ["texts:2:id", "texts:3", "texts:5:id"]
    assert [problem.where for problem in bad_ratings.shown] == ["ratings:3:ratings", "ratings:4"]


# Bad rows


@pytest.mark.parametrize(
    ("row", "where", "what"),
    [
        ('{"chosen": "a", "rejected": "b"', "1", "is not JSON"),
        ("[1]", "1", "is a JSON list"),
        ('{"chosen": "a", "chosen": "c", "rejected": "b"}', "1", "'chosen' stands there twice"),
        ('{"chosen": "a", "rejected": "b", "margin": NaN}', "1", "NaN is no JSON number"),
        ('{"chosen": "a", "rejected": "b", "margin": 1e999}', "1:margin", "finite"),
        ("[" * 100_000, "1", "nested too deeply"),
        ('{"chosen": "a\\ud800", "rejected": "b"}', "1:chosen", "surrogate"),
        ({"chosen": "a", "rejected": "b\0"}, "1:rejected", "NUL"),
        ({"chosen": "a"}, "1:rejected", "required"),
        ({"chosen": "a", "rejected": None}, "1:rejected", "required"),
        ({"chosen": 3, "rejected": "b"}, "1:chosen", "string"),
        ({"chosen": "a", "rejected": "b", "prompt": 3}, "1:prompt", "string"),
        ({"chosen": "a", "rejected": "b", "prompt": " \n"}, "1:prompt", "is empty"),
        ({"chosen": "a", "rejected": "b", "prompt": []}, "1:prompt", "at least 1"),
        ({"chosen": "a", "rejected": "b", "prompt": [{"role": "root", "content": "x"}]}, "1:prompt.0.role", "'user'"),
        ({"chosen": "a", "rejected": "b", "margin": "2"}, "1:margin", "number"),
        ({"chosen": "a", "rejected": "b", "margin": True}, "1:margin", "number"),
        ({"chosen": "a", "rejected": "b", "margin": -1}, "1:margin", "greater than or equal to 0"),
        ({"chosen": "a", "rejected": "b", "target": 1.5}, "1:target", "less than or equal to 1"),
        ({"chosen": "", "rejected": "b"}, "1:chosen", "is empty"),
        ({"chosen": "same ", "rejected": " same"}, "1", "chosen and rejected are the same"),
    ],
)  # fmt: skip
def test_a_bad_preference_is_named_by_row_and_field(tmp_path, row, where, what):
    (problem,) = problems(jsonl(tmp_path / "own.jsonl", row))
    assert problem.startswith(where + " ")
    assert what in problem


@pytest.mark.parametrize(
    ("chosen", "rejected", "where", "what"),
    [
        (turns("Hi", "a"), turns("Ho", "b"), "1 ", "differ before their last message"),
        (turns("Hi"), turns("Ho"), "1 ", "does not end with a reply"),
        (turns("Hi", "a"), turns("Hi", " a"), "1 ", "are the same"),
        (turns("", "a")[1:], turns("", "b")[1:], "1 ", "no message before"),
        (turns("Hi", ""), turns("Hi", "b"), "1:chosen.1.content ", "is empty"),
        ("Hi", turns("Hi", "b"), "1:chosen ", "list"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, chosen, rejected, where, what):
    (problem,) = problems(jsonl(tmp_path / "own.jsonl", {"chosen": chosen, "rejected": rejected}), "messages")
    assert problem.startswith(where)
    assert what in problem


def test_hh_text_without_turns_or_with_something_before_them_is_named(tmp_path):
    fine = "\n\nHuman: Hi\n\nAssistant: "
    rows = [
        {"chosen": "Hello", "rejected": fine + "b"},
        {"chosen": "x" + fine + "a", "rejected": fine + "b"},
        {"chosen": fine, "rejected": fine + "b"},
    ]
    found = problems(jsonl(tmp_path / "hh.jsonl", *rows), "hh")
    assert [problem.split(" ")[0] for problem in found] == ["1:chosen.0.role", "2:chosen.0.role", "3:chosen.1.content"]


@pytest.mark.parametrize(
    "row", [{"text": "a", "ratings": []}, {"text": "a", "ratings": ["1"]}, {"text": "a", "ratings": 1}]
)
def test_bad_ratings_are_named(tmp_path, row):
    (problem,) = problems(jsonl(tmp_path / "own.jsonl", row), "ratings")
    assert problem.startswith("1:ratings")


def test_all_bad_rows_are_counted_in_one_pass_and_twenty_are_shown(tmp_path):
    file = jsonl(tmp_path / "own.jsonl", *[PAIR, {"chosen": "", "rejected": 3}] * 30)
    bad = BadRows("own.jsonl")
    assert len(list(read_feedback(file, "preferences", bad))) == 30
    assert (bad.rows, bad.problems, len(bad.shown)) == (30, 60, 20)
    with pytest.raises(DataError, match=r"30 bad rows, 40 problems not shown"):
        bad.settle(drop=False)
    assert bad.settle(drop=True) == 30


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'{"chosen": "caf\xe9", "rejected": "b"}\n{"chosen": "", "rejected": "b"}\n')
    first, second = problems(file)
    assert first == "1 is not UTF-8: invalid continuation byte at byte 16"
    assert second.startswith("2:chosen")


def test_an_endless_line_is_reported_in_bounded_memory(tmp_path):
    file = tmp_path / "own.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(50):
            out.write(b"a" * MAX_ROW)
        out.write(b"\n" + json.dumps({"chosen": ""}).encode())
    tracemalloc.start()
    found = problems(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.split(" ")[0] for problem in found] == ["1", "2:chosen", "2:rejected"]
    assert peak < 8 * MAX_ROW


def test_csv_rows_of_another_width_and_broken_quotes_are_named(tmp_path):
    file = tmp_path / "own.csv"
    file.write_bytes(b'chosen,rejected\na,b,c\na\n"x\ny",z\ncaf\xe9,b\n"a"b,c\n')
    assert [problem.split(" — ")[0] for problem in problems(file)] == [
        "2 has not as many cells as the header",
        "3 has not as many cells as the header",
        "6 is not UTF-8: invalid continuation byte at byte 4",
        "7 is not CSV: ',' expected after '\"'",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("own.parquet", b"PAR1 not really"), ("own.jsonl.gz", b"\x1f\x8b\x08\0 cut"), ("own.xlsx", b"PK")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_text_in_parquet_that_is_not_utf8_is_named_by_row(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"chosen": column, "rejected": ["b", "c"]}), tmp_path / "own.parquet")
    (problem,) = problems(tmp_path / "own.parquet")
    assert problem.startswith("2:chosen is not UTF-8")
