"""What the canonical tables are, and what they say beyond their single rows: derived columns, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tasks.data.splits import asked, normal

PAIR_SPLITS = ("reward_train", "reward_eval", "judge_train", "judge_eval")
PROMPT_SPLITS = ("ppo", "dev", "test")

_TEXT, _REAL, _WHOLE = ("string", "large_string"), ("double",), ("int64", "int32")
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "pairs": {
        "pair_id": _TEXT, "format": _TEXT, "prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT, "margin": _REAL,
        "target": _REAL, "chosen_tokens": _WHOLE, "rejected_tokens": _WHOLE, "source": _TEXT, "reward": _TEXT,
        "group": _TEXT, "split": _TEXT,
    },
    "prompts": {
        "prompt_id": _TEXT, "format": _TEXT, "prompt": _TEXT, "tokens": _WHOLE, "source": _TEXT, "group": _TEXT,
        "split": _TEXT,
    },
}  # fmt: skip
"""The canonical columns, and the Arrow types that each may have."""

NEAR_TIE = 0.05
"""A target this close to one half says that raters are split."""
MARGIN_EDGES = (0, 1, 2, 3, 4)
"""Rating gaps at which the metrics part the pairs."""

LONGEST_OPENING = 12
"""Words up to which a prompt is looked for at the beginning of texts."""

Tables = dict[str, pd.DataFrame]


def derive(pairs: pd.DataFrame, prompts: pd.DataFrame, held: Mapping[str, str]) -> Tables:
    """The tables that the suites ask about, with what needs more than one row as columns of their own.

    `held` is what the probes of the evaluation hold (`splits.held_by`). A derived column that is empty in good
    rows names the trouble in bad ones: `opposite` the contradicting pair, `text_splits` the splits that share a text,
    `probe` the probe that asks the same. `place` says where a row lies: file:row.
    """
    pairs = pairs.assign(
        place=_places("pairs", pairs["pair_id"]),
        unreadable_prompt=_unreadable(pairs, none_allowed=True),
        opposite=_opposites(pairs),
        longer_wins=(np.sign(pairs["chosen_tokens"] - pairs["rejected_tokens"]) + 1) / 2,
        near_tie=(pairs["target"] - 0.5).abs() < NEAR_TIE,
        probe=_probes(pairs, held, texts=("chosen", "rejected")),
    )
    prompts = prompts.assign(
        place=_places("prompts", prompts["prompt_id"]),
        unreadable_prompt=_unreadable(prompts, none_allowed=False),
        begins_a_text=_begins_a_text(prompts["prompt"], pairs),
        probe=_probes(prompts, held),
    )
    return {
        "pairs": pairs,
        "prompts": prompts,
        "texts": _texts(pairs, prompts),
        "sources": _sources(pairs),
        "splits": _splits(pairs),
    }


def describe(tables: Tables) -> dict[str, Any]:
    """Figures of the data, for the metrics and the report."""
    pairs, prompts = tables["pairs"], tables["prompts"]
    edges = [*MARGIN_EDGES, np.inf]
    buckets = pd.cut(pairs["margin"], edges, right=False, labels=[f"from {edge}" for edge in MARGIN_EDGES])
    by_margin = pairs.groupby(buckets, observed=True)["target"].mean()
    return {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "rows": pd.concat([pairs["split"], prompts["split"]]).value_counts().sort_index().to_dict(),
        "longer_wins": _mean(pairs["longer_wins"]),
        "longer_wins_by_split": {split: _mean(part) for split, part in pairs.groupby("split")["longer_wins"]},
        "near_ties": _mean(pairs["near_tie"]),
        "mean_margin": _mean(pairs["margin"]),
        "mean_target": _mean(pairs["target"]),
        "mean_target_by_margin": {bucket: round(target, 4) for bucket, target in by_margin.items()},
        "longest_text_tokens": _most(pairs["chosen_tokens"], pairs["rejected_tokens"]),
        "longest_prompt_tokens": _most(prompts["tokens"]),
    }


def _places(table: str, ids: pd.Series) -> pd.Series:
    """file:row for every row; a row without an id goes by its number."""
    numbers = pd.Series([f"row {i}" for i in range(1, len(ids) + 1)], ids.index, "str")
    return f"{table}.parquet:" + ids.fillna(numbers)


def _unreadable(frame: pd.DataFrame, none_allowed: bool) -> pd.Series:
    """The prompts that are blank or, in a chat, no list of messages; a missing one is another expectation's."""
    unreadable = [
        prompt if isinstance(prompt, str) and not _is_prompt(prompt, form, none_allowed) else None
        for prompt, form in zip(frame["prompt"], frame["format"], strict=True)
    ]
    return pd.Series(unreadable, frame.index, "str")


def _is_prompt(prompt: str, form: str, none_allowed: bool) -> bool:
    if form != "chat":
        return bool(prompt.strip()) or (none_allowed and prompt == "")
    try:
        messages = json.loads(prompt)
    except ValueError:
        return False
    return isinstance(messages, list) and bool(messages) and all(_is_message(message) for message in messages)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _opposites(pairs: pd.DataFrame) -> pd.Series:
    """For each pair the id of one that states the opposite: same prompt, same texts, the other way round."""
    keys = list(zip(*(_normal(pairs[column]) for column in ("prompt", "chosen", "rejected")), strict=True))
    ids = dict(zip(keys, pairs["pair_id"], strict=True))
    opposites = [ids.get((prompt, no, yes)) if yes != no else None for prompt, yes, no in keys]
    return pd.Series(opposites, pairs.index, "str")


def _probes(frame: pd.DataFrame, held: Mapping[str, str], texts: Sequence[str] = ()) -> pd.Series:
    """The probe that holds a row's prompt, or one of its `texts`."""
    # A prompt that is no conversation though it should be is another expectation's.
    readable = _unreadable(frame, none_allowed=True).isna() & frame["prompt"].notna()
    prompts = zip(frame["prompt"].where(readable, ""), frame["format"].where(readable, "text"), strict=True)
    found = pd.Series([held.get(asked(prompt, form)) for prompt, form in prompts], frame.index, "str")
    for column in texts:
        found = found.fillna(_normal(frame[column]).map(held).astype("str"))
    return found


def _begins_a_text(prompts: pd.Series, pairs: pd.DataFrame) -> pd.Series:
    """Whether a prompt of a few words is how some text of the pairs begins."""
    wanted = _normal(prompts)
    sizes = set(wanted.str.count(" ").add(1).loc[lambda size: size <= LONGEST_OPENING].astype(int))
    texts = _normal(pd.concat([pairs["chosen"], pairs["rejected"]])).drop_duplicates().str.split()
    return wanted.isin({" ".join(words[:size]) for words in texts for size in sizes if len(words) > size})


def _texts(pairs: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """Every occurrence of a text or a prompt that is not blank, and the splits that share it or its group."""
    occurrences = [(pairs, "chosen"), (pairs, "rejected"), (pairs, "prompt"), (prompts, "prompt")]
    texts = pd.concat(
        [
            pd.DataFrame({"place": frame["place"] + f":{field}", "text": _normal(frame[field])}).join(
                frame[["group", "split"]]
            )
            for frame, field in occurrences
        ],
        ignore_index=True,
    )
    texts = texts[texts["text"] != ""]
    return texts.assign(text_splits=_shared_by(texts, "text"), group_splits=_shared_by(texts, "group"))


def _shared_by(texts: pd.DataFrame, key: str) -> pd.Series:
    """The names of the splits, where the same key is in more than one."""
    places = texts[[key, "split"]].drop_duplicates().dropna().sort_values("split")
    several = places[places.duplicated(key, keep=False)]
    return texts[key].map(several.groupby(key)["split"].agg(", ".join))


def _normal(texts: pd.Series) -> pd.Series:
    """The texts with what a reader would call the same made the same; a missing one is blank."""
    return texts.fillna("").map(normal)


def _sources(pairs: pd.DataFrame) -> pd.DataFrame:
    means = pairs.groupby("source", as_index=False)["target"].mean()
    return pd.DataFrame({"place": "pairs.parquet:source " + means["source"], "mean_target": means["target"]})


def _splits(pairs: pd.DataFrame) -> pd.DataFrame:
    counts = pairs["split"].value_counts().rename_axis("split").reset_index(name="pairs")
    return pd.DataFrame(
        {
            "place": "pairs.parquet:split " + counts["split"],
            "training_pairs": counts["pairs"].where(counts["split"].str.endswith("_train")),
            "held_out_pairs": counts["pairs"].where(counts["split"].str.endswith("_eval")),
        }
    )


def _mean(values: pd.Series) -> float | None:
    return round(float(values.mean()), 4) if values.notna().any() else None


def _most(*columns: pd.Series) -> int | None:
    values = pd.concat(columns)
    return int(values.max()) if values.notna().any() else None
