"""The validate stage: a clean frame passes, and each fault planted in it breaks exactly the expectation about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import tiny_params

from tasks.__main__ import main
from tasks.errors import DataError
from tasks.expectations import PAIR_SPLITS, PROMPT_SPLITS
from tasks.params import Params, check_params
from tasks.validate import examine, run
from tasks.workspace import Workspace

PER_SPLIT = 10
CHAT = json.dumps([{"role": "user", "content": "Name a film."}])


def good_pairs() -> pd.DataFrame:
    """Ten pairs a split: texts and groups of their own, length no lesson, the first four with a prompt."""
    rows = [
        {
            "pair_id": f"pair{i}",
            "format": "chat" if i == 1 else "text",
            "prompt": {0: "Was it good?", 1: CHAT, 2: "And the cast?"}.get(i, ""),
            "chosen": f"A lovely film, number {i}.",
            "rejected": f"A dreadful film, number {i}.",
            "margin": 0.5 + i % 4,
            "target": 0.7 + 0.05 * (i % 4),
            "chosen_tokens": 8 + i % 2,
            "rejected_tokens": 9 - i % 2,
            "source": "first" if i % 2 else "second",
            "group": f"group{i}",
            "split": PAIR_SPLITS[i // PER_SPLIT],
        }
        for i in range(PER_SPLIT * len(PAIR_SPLITS))
    ]
    return pd.DataFrame(rows)


def good_prompts() -> pd.DataFrame:
    rows = [
        {
            "prompt_id": f"prompt{i}",
            "format": "text",
            "prompt": f"The {i}th scene",
            "tokens": 4,
            "source": "first",
            "group": f"opening{i}",
            "split": PROMPT_SPLITS[i // PER_SPLIT],
        }
        for i in range(PER_SPLIT * len(PROMPT_SPLITS))
    ]
    return pd.DataFrame(rows)


def small_params(**limits: Any) -> Params:
    raw = tiny_params()
    raw["validate"] = {"min_pairs": 5, **limits}
    return check_params(raw)


@dataclass
class Data:
    pairs: pd.DataFrame
    prompts: pd.DataFrame

    def set(self, row: int, **values: Any) -> None:
        """Overwrite fields of one pair."""
        for column, value in values.items():
            self.pairs.loc[row, column] = value

    def write(self, root: Path) -> Workspace:
        workspace = Workspace(root)
        workspace.canonical.mkdir(parents=True)
        self.pairs.to_parquet(workspace.pairs)
        self.prompts.to_parquet(workspace.prompts)
        return workspace


@pytest.fixture
def data() -> Data:
    return Data(good_pairs(), good_prompts())


def pair(**values: Any) -> Callable[[Data], None]:
    return lambda data: data.set(3, **values)


def prompt(**values: Any) -> Callable[[Data], None]:
    def plant(data: Data) -> None:
        for column, value in values.items():
            data.prompts.loc[3, column] = value

    return plant


def column(table: str, name: str, values: Any) -> Callable[[Data], None]:
    return lambda data: getattr(data, table).__setitem__(name, values)


def keep(table: str, which: Callable[[pd.DataFrame], pd.Series]) -> Callable[[Data], None]:
    def plant(data: Data) -> None:
        frame = getattr(data, table)
        setattr(data, table, frame[which(frame)].reset_index(drop=True))

    return plant


def copied_pair(data: Data) -> None:
    data.pairs = pd.concat([data.pairs, data.pairs.loc[[3]].assign(pair_id="copy")], ignore_index=True)


def copied_prompt(data: Data) -> None:
    data.prompts = pd.concat([data.prompts, data.prompts.loc[[3]].assign(prompt_id="copy")], ignore_index=True)


def opposite_pair(data: Data) -> None:
    one = data.pairs.loc[3]
    data.set(4, chosen=one["rejected"], rejected=one["chosen"])


LAST = PER_SPLIT * len(PAIR_SPLITS) - 1
FAULTS: list[tuple[str, Callable[[Data], None]]] = [
    ("pairs.columns", lambda data: data.pairs.drop(columns="margin", inplace=True)),
    ("pairs.columns", column("pairs", "note", "foreign")),
    ("pairs.types", column("pairs", "margin", "1.0")),
    ("pairs.types", column("pairs", "chosen", None)),
    ("pairs.types", column("pairs", "chosen_tokens", 8.0)),
    ("prompts.columns", lambda data: data.prompts.drop(columns="group", inplace=True)),
    ("prompts.types", column("prompts", "tokens", "4")),
    *(
        (f"pairs.present.{name}", pair(**{name: None}))
        for name in ("pair_id", "format", "prompt", "chosen", "rejected", "margin", "target", "source", "group")
    ),
    ("pairs.present.rejected_tokens", lambda data: data.pairs.__setitem__(
        "rejected_tokens", data.pairs["rejected_tokens"].astype("Int64").where(data.pairs.index != 3))),
    *((f"prompts.present.{name}", prompt(**{name: None})) for name in ("prompt_id", "prompt", "group", "split")),
    ("pairs.id_unique", pair(pair_id="pair7")),
    ("prompts.id_unique", prompt(prompt_id="prompt7")),
    ("pairs.format_known", pair(format="html")),
    ("prompts.format_known", prompt(format="html")),
    ("pairs.split_known", pair(split="reward_trian")),
    ("prompts.split_known", prompt(split="train")),
    ("pairs.splits_filled", keep("pairs", lambda frame: frame["split"] != "judge_eval")),
    ("prompts.splits_filled", keep("prompts", lambda frame: frame["split"] != "dev")),
    ("pairs.not_blank.chosen", pair(chosen="")),
    ("pairs.not_blank.rejected", pair(rejected=" \n\t")),
    ("pairs.prompt_readable", pair(prompt="  ")),
    ("pairs.prompt_readable", pair(format="chat", prompt="Name a film.")),
    ("pairs.prompt_readable", pair(format="chat", prompt="[]")),
    ("pairs.prompt_readable", pair(format="chat", prompt='[{"role": "user"}]')),
    ("prompts.prompt_readable", prompt(prompt="")),
    ("pairs.chosen_differs", pair(chosen="Just the same.", rejected="Just the same. ")),
    ("pairs.unique", copied_pair),
    ("pairs.no_contradictions", opposite_pair),
    ("pairs.chosen_tokens", pair(chosen_tokens=257)),
    ("pairs.rejected_tokens", pair(rejected_tokens=0)),
    ("pairs.margin", pair(margin=-0.1)),
    ("pairs.margin", pair(margin=np.inf)),
    ("pairs.target", pair(target=1.01)),
    ("pairs.longer_wins", column("pairs", "chosen_tokens", 20)),
    ("pairs.longer_wins", column("pairs", "chosen_tokens", 2)),
    ("pairs.near_ties", lambda data: data.pairs.__setitem__(
        "target", data.pairs["target"].where(data.pairs.index % 5 < 2, 0.52))),
    ("prompts.unique", copied_prompt),
    ("prompts.tokens", prompt(tokens=65)),
    # Leaks: between roles, between training and held-out, a prompt of a pair, an opening by its text's group.
    ("splits.text_in_one", lambda data: data.set(LAST, chosen=data.pairs.loc[3, "rejected"])),
    ("splits.text_in_one", lambda data: data.set(PER_SPLIT, rejected=data.pairs.loc[3, "rejected"])),
    ("splits.text_in_one", lambda data: data.set(LAST, prompt="Was it good?")),
    ("splits.text_in_one", prompt(prompt="And the cast?")),
    ("splits.text_in_one", prompt(prompt="The 13th scene")),
    ("splits.group_in_one", prompt(group="group7")),
    ("splits.group_in_one", lambda data: data.set(LAST, group="group25")),
    ("sources.chosen_preferred", lambda data: data.pairs.__setitem__(
        "target", data.pairs["target"].where(data.pairs["source"] == "first", 0.4))),
    ("splits.enough_training", keep("pairs", lambda frame: (frame["split"] != "judge_train") | (frame.index % 4 == 0))),
    ("splits.enough_held_out", keep("pairs", lambda frame: (frame["split"] != "reward_eval") | (frame.index % 4 == 0))),
]  # fmt: skip
WARNINGS = {"pairs.longer_wins", "pairs.near_ties", "splits.enough_held_out"}


def test_clean_data_passes_and_is_described(data: Data, tmp_path: Path) -> None:
    workspace = data.write(tmp_path)
    result = run(small_params(), workspace)
    assert result.metrics["expectations"]["passed"] == result.metrics["expectations"]["checked"] > 40
    assert result.metrics["failed"] == {}
    assert result.metrics["rows"] == dict.fromkeys([*PAIR_SPLITS, *PROMPT_SPLITS], PER_SPLIT)
    assert result.metrics["longer_wins"] == 0.5
    # Margins 0.5, 1.5, 2.5, 3.5 have targets 0.70, 0.75, 0.80, 0.85.
    assert result.metrics["mean_target_by_margin"] == {"from 0": 0.7, "from 1": 0.75, "from 2": 0.8, "from 3": 0.85}
    assert {path.name for path in workspace.report("validate").iterdir()} == {
        "report.html", "report.md", "pairs.svg", "lengths.svg",
    }  # fmt: skip
    assert "fit for training" in result.details["markdown"]
    assert "data:image/svg+xml" in result.details["markdown"]


@pytest.mark.parametrize(("name", "plant"), FAULTS, ids=[name for name, _ in FAULTS])
def test_each_fault_breaks_exactly_its_expectation(
    name: str, plant: Callable[[Data], None], data: Data, tmp_path: Path
) -> None:
    plant(data)
    findings, _ = examine(small_params(), data.write(tmp_path))
    assert [finding.name for finding in findings if not finding.ok] == [name]
    broken = next(finding for finding in findings if not finding.ok)
    assert broken.severity == ("warning" if name in WARNINGS else "critical")
    assert broken.mend


def test_every_expectation_is_named_once_and_guards_against_a_planted_fault(data: Data, tmp_path: Path) -> None:
    findings, _ = examine(small_params(), data.write(tmp_path))
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    # Of the presence of columns a selection is planted; they come from one loop.
    planted = {name for name, _ in FAULTS}
    assert {name for name in names if ".present." not in name} <= planted


def test_a_breach_stops_with_the_rows_and_the_mend_and_leaves_the_rest_alone(data: Data, tmp_path: Path) -> None:
    data.set(3, chosen=" ", margin=99.0)
    data.set(PER_SPLIT, margin=12.0)
    workspace = data.write(tmp_path)
    model = workspace.policy / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    before = {path: path.read_bytes() for path in (workspace.pairs, workspace.prompts, model)}

    with pytest.raises(DataError) as caught:
        run(small_params(), workspace)

    assert caught.value.exit_code == 3
    blank, margin = caught.value.problems
    assert blank.where == "pairs.parquet:pair3:chosen"
    assert margin.where == "pairs.parquet:pair3:margin, pairs.parquet:pair10:margin"
    assert "2 of 40 rows" in margin.what
    assert "validate.max_margin" in margin.mend
    metrics = json.loads(workspace.metrics("validate").read_text())
    assert metrics["failed"] == {"pairs.not_blank.chosen": 1, "pairs.margin": 2}
    assert metrics["expectations"]["critical"] == 2
    report = workspace.report("validate")
    for name in ("report.html", "report.md"):
        assert "not fit for training: 2 critical expectations broken" in (report / name).read_text()
        assert "pair10" in (report / name).read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_a_wrong_schema_is_reported_without_asking_further(data: Data, tmp_path: Path) -> None:
    data.pairs = data.pairs.rename(columns={"chosen": "preferred"})
    workspace = data.write(tmp_path)
    with pytest.raises(DataError, match="missing: chosen; foreign: preferred"):
        run(small_params(), workspace)
    assert "not fit" in (workspace.report("validate") / "report.html").read_text()


def test_warnings_do_not_stop(data: Data, tmp_path: Path) -> None:
    data.pairs["chosen_tokens"] = 20
    result = run(small_params(), data.write(tmp_path))
    assert result.metrics["failed"] == {"pairs.longer_wins": 1}
    assert "warnings: pairs.longer_wins" in result.summary
    assert "fit for training" in result.details["markdown"]


def test_contradictions_up_to_the_allowed_share(data: Data, tmp_path: Path) -> None:
    opposite_pair(data)  # 2 of 40 pairs
    workspace = data.write(tmp_path)
    assert not [f for f in examine(small_params(max_contradictions=0.05), workspace)[0] if not f.ok]
    broken = [f for f in examine(small_params(max_contradictions=0.04), workspace)[0] if not f.ok]
    assert [(f.name, f.failed) for f in broken] == [("pairs.no_contradictions", 2)]
    assert broken[0].examples[0].value == "pair4"


def test_empty_tables_are_a_breach_like_any_other(data: Data, tmp_path: Path) -> None:
    empty = Data(data.pairs.iloc[:0], data.prompts.iloc[:0])
    with pytest.raises(DataError) as caught:
        run(small_params(), empty.write(tmp_path))
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == [
        "pairs.splits_filled", "prompts.splits_filled",
    ]  # fmt: skip


def test_text_from_data_is_shown_not_obeyed(data: Data, tmp_path: Path) -> None:
    data.set(3, margin=9.0, chosen="<script>alert(1)</script> ![x](http://example.org/x.png) | cell")
    workspace = data.write(tmp_path)
    with pytest.raises(DataError):
        run(small_params(), workspace)
    page = (workspace.report("validate") / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    markdown = (workspace.report("validate") / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<", "")
    assert "![x](" not in markdown


def test_missing_or_unreadable_files_from_the_command_line(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path)
    workspace.params.write_text(yaml.safe_dump(tiny_params()))
    command = ["validate", "--workspace", str(tmp_path)]
    assert main(command) == 3
    assert "data/canonical/pairs.parquet — no such file" in capsys.readouterr().err
    data.write(tmp_path)
    workspace.prompts.write_text("no parquet")
    assert main(command) == 3
    assert "data/canonical/prompts.parquet — is not Parquet" in capsys.readouterr().err
    data.prompts.to_parquet(workspace.prompts)
    assert main([*command, "--set", "validate.min_pairs=5"]) == 0
    assert json.loads(workspace.metrics("validate").read_text())["expectations"]["critical"] == 0
