"""Scored replies and bare prompts: what they become, what is said of bad rows, and where they go."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.formats import RatedText
from tasks.data.pairing import length_balance, prompt_pairs
from tasks.data.rows import BadRows
from tasks.data.scored import BarePrompt, read_prompts, read_replies
from tasks.data_params import DataSource
from tasks.errors import DataError
from tasks.ingest import run
from tasks.params import check_params
from tasks.workspace import Workspace

COLUMNS = {"prompt": "asked", "response": "said", "scores": ["one", "two"]}
HARM = {"format": "scored", "columns": COLUMNS, "higher_is_worse": True, "chat": True, "comment": "#"}
CSV = """# version 1, "not a row
# and more
asked,said,one,two,more
How?," Like this.
",0.25,,x
How?,No.,0,1,x
"""


def user(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}])


def source(**changes: Any) -> DataSource:
    return DataSource.model_validate({"source": "file:x.csv", **HARM, **changes})


def replies(path: Path, bad: BadRows, **changes: Any) -> list[RatedText]:
    named = source(**changes)
    return list(read_replies(path, named, bad, -1 if named.higher_is_worse else 1))


def test_scores_of_several_raters_are_turned_and_comment_lines_passed_over(tmp_path: Path) -> None:
    (file := tmp_path / "x.csv").write_text(CSV, encoding="utf-8")
    bad = BadRows("x.csv")
    assert replies(file, bad) == [
        RatedText("Like this.", (-0.25,), 5, format="chat", prompt=user("How?")),
        RatedText("No.", (0.0, -1.0), 6, format="chat", prompt=user("How?")),
    ]
    plain = replies(file, bad, higher_is_worse=False, chat=False)[0]
    assert plain == RatedText(" Like this.\n", (0.25,), 5, prompt="How?")
    assert bad.problems == 0


def test_comment_lines_are_part_of_the_table_where_none_are_declared(tmp_path: Path) -> None:
    (file := tmp_path / "x.csv").write_text(CSV, encoding="utf-8")
    bad = BadRows("x.csv")
    assert replies(file, bad, comment="") == []
    assert bad.problems
    (file := tmp_path / "y.csv").write_text("asked,said,one\n#1,#2,0.5\n", encoding="utf-8")
    assert [reply.text for reply in replies(file, bad)] == ["#2"], "after the head, # begins a cell"


def test_every_bad_row_of_a_file_is_named_with_the_users_own_columns(tmp_path: Path) -> None:
    rows = ["asked,said,one,two", ",b,1,1", "a,,1,1", "a,b,,", "a,b,much,1", "a,b,1,1e9", "a,b,1,1"]
    (file := tmp_path / "x.csv").write_text("\n".join(rows), encoding="utf-8")
    bad = BadRows("x.csv")
    assert len(replies(file, bad)) == 1
    assert [str(problem).split(" — ")[:2] for problem in bad.shown] == [
        ["x.csv:2:asked", "Field required"],
        ["x.csv:3:said", "Field required"],
        ["x.csv:4", "has no score in any of the columns that `columns.scores` names"],
        ["x.csv:5:one", "Input should be a valid number"],
        ["x.csv:6:two", "Input should be less than or equal to 1000000"],
    ]


def test_prompts_are_lines_or_a_column(tmp_path: Path) -> None:
    (text := tmp_path / "p.txt").write_text("Why?\n\n  What now? \n", encoding="utf-8")
    table = tiny_jsonl(
        tmp_path / "p.jsonl", {"asked": "Why?"}, {"asked": [{"role": "user", "content": "So?"}]}, {"a": 1}
    )
    bad = BadRows("p")
    plain = source(format="prompts", chat=False)
    assert list(read_prompts(text, plain, bad)) == [BarePrompt("text", "Why?", 1), BarePrompt("text", "What now?", 3)]
    found = list(read_prompts(table, source(format="prompts"), bad))
    assert found == [BarePrompt("chat", user("Why?"), 1), BarePrompt("chat", user("So?"), 2)]
    assert [str(problem) for problem in bad.shown] == ["p:3:asked — Field required — add the field"]


def tiny_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Pairs


def test_all_replies_to_a_prompt_are_compared_by_gap_and_raters() -> None:
    ratings = [(-1.0,), (-0.5, -0.25), (-0.4, -0.3), (0.0,)]
    texts = [RatedText(f"reply {i}", each, i, prompt="p") for i, each in enumerate(ratings)]
    found = {
        (pair.chosen.row, pair.rejected.row): (pair.margin, pair.target)
        for run in prompt_pairs(texts, 0.36)
        for pair in run
    }
    # The means are -1, -.375, -.35, 0: of 1 and 2 the gap is too small, of 2 and 3 it is .35.
    assert found == {
        (3, 0): (1.0, 1.0),
        (3, 1): (0.375, 1.0),
        (2, 0): (pytest.approx(0.65), 1.0),
        (1, 0): (0.625, 1.0),
    }


@given(st.lists(st.floats(0.1, 10), max_size=60), st.integers(0, 3))
def test_what_is_kept_prefers_neither_the_longer_nor_the_much_longer(ratios: list[float], seed: int) -> None:
    kept = length_balance(ratios, random.Random(seed))
    assert kept == sorted(set(kept))
    logs = [math.log(ratios[i]) for i in kept]
    for step in range(1, 6):
        alike = [log for log in logs if 0.5 * (step - 1) < abs(log) <= 0.5 * step]
        assert sum(log > 0 for log in alike) * 2 == len(alike)
        before = [log for log in map(math.log, ratios) if 0.5 * (step - 1) < abs(log) <= 0.5 * step]
        assert len(alike) == 2 * min(sum(log > 0 for log in before), sum(log < 0 for log in before))
    assert sum(log == 0 for log in logs) == sum(math.log(ratio) == 0 for ratio in ratios)


# Through the stage


@pytest.fixture
def bare(tmp_path: Path, policy_folder: Path, judge_folder: Path) -> Workspace:
    workspace = Workspace(tmp_path / "bare")
    workspace.own_data.mkdir(parents=True)
    shutil.copytree(policy_folder, workspace.own_data / "policy")
    shutil.copytree(judge_folder, workspace.own_data / "judge")
    return workspace


def ingest(
    bare: Workspace, data: list[dict[str, Any]], **section: Any
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    raw = tiny.tiny_params()
    raw["ingest"] |= {"data": data, "splits": {"reward": 0.5, "judge": 0.4, "held_out": 0.3, "dev": 2, "test": 3}}
    raw["ingest"] |= section
    result = run(check_params(raw), bare)
    return pd.read_parquet(bare.pairs), pd.read_parquet(bare.prompts), result.metrics


def harm_files(bare: Workspace, several: int = 24, single: int = 6) -> dict[str, Any]:
    """Two CSV files: three replies to each of `several` prompts, the shorter the better; one to each of `single`."""
    folder = bare.own_data / "harm"
    folder.mkdir()
    rows = [f"Ask {i},{'no ' * (1 + 2 * n)}{i},{n / 2}," for i in range(several) for n in range(3)]
    rows += [f"Once {i},never {i},0.5," for i in range(single)]
    for name, part in (("a", rows[::2]), ("b", rows[1::2])):
        (folder / f"{name}.csv").write_text("# head\nasked,said,one,two\n" + "\n".join(part), encoding="utf-8")
    (folder / "notes.txt").write_text("no table")
    return {"source": "file:harm", "file": "*.csv", **HARM}


def test_several_files_are_one_source_and_prompts_stay_together(bare: Workspace) -> None:
    bare_prompts = tiny_jsonl(
        bare.own_data / "p.jsonl", *({"asked": f"Bare {i}"} for i in range(9)), {"asked": "Ask 3"}
    )
    more = {"source": f"file:{bare_prompts.name}", "format": "prompts", "columns": {"prompt": "asked"}, "chat": True}
    pairs, prompts, metrics = ingest(bare, [harm_files(bare), more])
    assert metrics["rows"] == 24 * 3 + 6 + 10
    assert pairs["pair_id"].is_unique
    # Three replies give three pairs; those of one prompt are in one split, whichever file they came from.
    assert (pairs.groupby("prompt")["split"].nunique() == 1).all()
    assert (pairs.groupby("prompt").size() == 3).all()
    assert (pairs["format"] == "chat").all()
    assert (
        pairs["margin"] == pairs["chosen"].str.len().lt(pairs["rejected"].str.len()).astype(float) * pairs["margin"]
    ).all()
    asked = set(pairs["prompt"])
    assert asked.isdisjoint(prompts["prompt"])
    # Prompts with one reply, and those that nobody has answered, are PPO's: all but the one that pairs have, if any.
    free = {user(f"Once {i}") for i in range(6)} | {user(f"Bare {i}") for i in range(9)}
    assert free <= set(prompts["prompt"])
    assert (user("Ask 3") in set(prompts["prompt"])) == (user("Ask 3") not in asked)
    origin = [entry for entry in json.loads(bare.provenance.read_text()) if entry["name"] == "data"]
    assert [(entry["file"], entry["rows"]) for entry in origin] == [
        ("*.csv", 78),
        (f"data/own/{bare_prompts.name}", 10),
    ]


def test_where_shorter_always_wins_a_balance_leaves_nothing(bare: Workspace) -> None:
    with pytest.raises(DataError, match="no pairs for reward_train"):
        ingest(bare, [harm_files(bare)], pairing={"balance_length": True})


def test_bad_rows_of_all_files_are_told_at_once(bare: Workspace) -> None:
    data = harm_files(bare)
    for name in ("a", "b"):
        with (bare.own_data / f"harm/{name}.csv").open("a", encoding="utf-8") as file:
            file.write("\nAsk,,0.5,\n")
    with pytest.raises(DataError) as caught:
        ingest(bare, [data])
    assert caught.match(r"data/own/harm/a\.csv:42:said")
    assert caught.match(r"data/own/harm/b\.csv:42:said")


def test_a_pattern_without_files_is_a_data_error(bare: Workspace) -> None:
    with pytest.raises(DataError, match=r"data/own/harm — holds no \*\.tsv"):
        ingest(bare, [harm_files(bare) | {"file": "*.tsv"}])


def test_a_source_says_which_reward_learns_from_it(bare: Workspace) -> None:
    pairs, _, _ = ingest(bare, [harm_files(bare) | {"reward": "harmless"}])
    assert set(pairs["reward"]) == {"harmless"}
