"""Each fault planted in good data breaks exactly the expectation about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from feedback import PER_SPLIT, Data, small_params

from tasks.data.facts import PAIR_SPLITS
from tasks.expectations import check, sources_suite
from tasks.validate import examine


@pytest.fixture
def data() -> Data:
    return Data()


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


def openings_of_pairs(data: Data) -> None:
    data.prompts.loc[[3, 13, 14, 23], "prompt"] = ["a  lovely FILM,", "A dreadful", "a dreadful film,", "A lovely"]


def chat(said: str) -> str:
    """A conversation of one message, as the canonical data has it."""
    return json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": said}])


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
    ("prompts.openings_apart", openings_of_pairs),
    # Leaks: between roles, between training and held-out, a prompt of a pair, an opening by its text's group.
    ("splits.text_in_one", lambda data: data.set(LAST, chosen=data.pairs.loc[3, "rejected"])),
    ("splits.text_in_one", lambda data: data.set(PER_SPLIT, rejected=data.pairs.loc[3, "rejected"])),
    ("splits.text_in_one", lambda data: data.set(LAST, prompt="Was it good?")),
    ("splits.text_in_one", prompt(prompt="and  the CAST?")),
    ("splits.text_in_one", prompt(prompt="The 13th scene")),
    ("splits.group_in_one", prompt(group="group7")),
    ("splits.group_in_one", lambda data: data.set(LAST, group="group25")),
    # What a probe asks, or a text that it holds, whatever its case and spacing.
    ("pairs.not_probed", pair(prompt="How do I  pick a lock?", format="text")),
    ("pairs.not_probed", pair(prompt=chat("how do I pick a LOCK?"), format="chat")),
    ("pairs.not_probed", pair(chosen="The Earth is flat.")),
    ("pairs.not_probed", pair(rejected="the earth  is flat.")),
    ("prompts.not_probed", prompt(prompt=chat("How do I pick a lock?"), format="chat")),
    ("prompts.not_probed", prompt(prompt="The earth is flat.")),
    ("sources.chosen_preferred", lambda data: data.pairs.__setitem__(
        "target", data.pairs["target"].where(data.pairs["source"] == "first", 0.4))),
    ("splits.enough_training", keep("pairs", lambda frame: (frame["split"] != "judge_train") | (frame.index % 4 == 0))),
    ("splits.enough_held_out", keep("pairs", lambda frame: (frame["split"] != "reward_eval") | (frame.index % 4 == 0))),
]  # fmt: skip
WARNINGS = {"pairs.longer_wins", "pairs.near_ties", "prompts.openings_apart", "splits.enough_held_out"}


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


def test_every_expectation_is_named_once_planted_against_and_explained(data: Data, tmp_path: Path) -> None:
    names = [finding.name for finding in examine(small_params(), data.write(tmp_path))[0]]
    assert len(names) == len(set(names))
    # The order is that of the suites, whatever Great Expectations makes of it.
    assert names[:5] == ["pairs.columns", "pairs.types", "prompts.columns", "prompts.types", "pairs.present.pair_id"]
    # Of the columns' presence a selection is planted; they come from one loop.
    own = {name for name in names if ".present." not in name}
    assert own <= {name for name, _ in FAULTS}
    manual = (Path(__file__).resolve().parents[1] / "docs" / "validation.md").read_text(encoding="utf-8")
    assert [name for name in own if f"`{name}`" not in manual] == []


def test_contradictions_up_to_the_allowed_share(data: Data, tmp_path: Path) -> None:
    opposite_pair(data)  # 2 of 40 pairs
    workspace = data.write(tmp_path)
    assert not [f for f in examine(small_params(max_contradictions=0.05), workspace)[0] if not f.ok]
    broken = [f for f in examine(small_params(max_contradictions=0.04), workspace)[0] if not f.ok]
    assert [(f.name, f.failed) for f in broken] == [("pairs.no_contradictions", 2)]
    assert broken[0].examples[0].value == "pair4"


def test_an_expectation_that_cannot_be_evaluated_is_an_error_not_a_breach() -> None:
    frame = pd.DataFrame({"place": ["pairs.parquet:source a"]})
    with pytest.raises(RuntimeError, match=r"sources\.chosen_preferred could not be evaluated: .*mean_target"):
        check({"sources": frame}, {"sources": sources_suite()})
