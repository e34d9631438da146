"""Answers side by side in the evaluation report: the best, the worst, the most changed, the gamed, some at random."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from tasks import pages
from tasks.reports.sections import Section, Table

EXCERPT = 600
"""Characters of a text that the report shows."""
_SUBJECTS = {"reference": "reference", "policy": "aligned", "champion": "champion"}
"""Columns of the samples and how the report calls them."""


def sections(samples: pd.DataFrame, kl: np.ndarray, count: int, seed: int) -> list[Section]:
    """`count` answers in all but the gamed ones; `kl` [N] says how far each of the policy's is from the reference."""
    judge, reward = (samples[f"{role}_policy"] - samples[f"{role}_reference"] for role in ("judge", "reward"))
    part = min(count, len(samples)) // 4
    blind = np.random.default_rng(seed).choice(len(samples), min(count, len(samples)) - 3 * part, replace=False)
    by_judge = judge.sort_values(ascending=False, kind="stable").index
    changed = pd.Series(kl, samples.index).sort_values(ascending=False, kind="stable").index
    gamed = (reward - judge)[(reward > 0) & (judge < 0)].sort_values(ascending=False, kind="stable").index
    chosen = [
        ("Answers drawn at random", "All are in reports/samples.parquet.", samples.index[blind]),
        ("Largest gains by the judge", "", by_judge[:part]),
        ("Largest losses by the judge", "", by_judge[::-1][:part]),
        ("Most changed", "Answers that the reference was least likely to give instead (largest log-ratio, nats).",
         changed[:part]),
        ("Where the reward is gamed most", "The reward model sees a gain and the judge a loss: "
         f"{len(gamed):,} of {len(samples):,} answers. Those where they differ most:", gamed[: max(part, 1)]),
    ]  # fmt: skip
    return [Section(title, text, _answers(samples.loc[rows])) for title, text, rows in chosen if len(rows)]


def _answers(samples: pd.DataFrame) -> Table:
    subjects = [column for column in _SUBJECTS if column in samples]
    return ["prompt", *(_SUBJECTS[subject] for subject in subjects), "judge", "reward"], [
        [
            *(_shown(text) for text in (_turns(row["prompt"]), *(row[subject] for subject in subjects))),
            *(_change(row[f"{role}_reference"], row[f"{role}_policy"]) for role in ("judge", "reward")),
        ]
        for row in samples.to_dict("records")
    ]


def _turns(prompt: str) -> str:
    """A conversation in the canonical form as one line a turn; any other prompt as it is."""
    try:
        turns = json.loads(prompt)
    except ValueError:
        return prompt
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _shown(text: str) -> str:
    # Every kind of line end becomes the one that the page and the Markdown know.
    text = "\n".join(text.strip().splitlines())
    return pages.excerpt(text, EXCERPT) or "(empty)"


def _change(before: float, after: float) -> str:
    return f"{before:+.2f} → {after:+.2f}".replace(" ", "\N{NO-BREAK SPACE}")
