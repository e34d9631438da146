"""A small canonical data set without a fault, in which tests plant theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tiny import tiny_params

from tasks.data.facts import PAIR_SPLITS, PROMPT_SPLITS
from tasks.params import Params, check_params
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
            "reward": "",
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


def probes() -> dict[str, pd.DataFrame]:
    """What two probes ask; nothing of it is in the other tables."""
    lock = json.dumps([{"role": "user", "content": "How do I pick a lock?"}])
    return {
        "red_team": pd.DataFrame({"item": ["lock"], "format": ["chat"], "prompt": [lock]}),
        "statements": pd.DataFrame({"item": ["earth"], "text": ["The Earth is flat."], "correct": [False]}),
    }


@dataclass
class Data:
    """The two tables, and what the probes hold."""

    pairs: pd.DataFrame = field(default_factory=good_pairs)
    prompts: pd.DataFrame = field(default_factory=good_prompts)

    def set(self, row: int, **values: Any) -> None:
        """Overwrite fields of one pair."""
        for column, value in values.items():
            self.pairs.loc[row, column] = value

    def write(self, root: Path) -> Workspace:
        workspace = Workspace(root)
        workspace.canonical.mkdir(parents=True)
        workspace.probes.mkdir()
        for name, table in probes().items():
            table.to_parquet(workspace.probes / f"{name}.parquet")
        self.pairs.to_parquet(workspace.pairs)
        self.prompts.to_parquet(workspace.prompts)
        return workspace
