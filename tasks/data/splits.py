"""Duplicates, what hangs together, and splits that share nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from networkx.utils import UnionFind  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import pandas as pd

Item = TypeVar("Item")


def normal(text: str) -> str:
    """What two texts have in common that are the same to a reader: case and white space do not count."""
    return " ".join(text.casefold().split())


def asked(prompt: str, format: str) -> str:
    """What a prompt asks, as `normal` has it: a text, or what the turns of a conversation say one after the other."""
    if format == "chat":
        prompt = "\n".join(turn["content"] for turn in json.loads(prompt) if turn["role"] != "system")
    return normal(prompt)


def held_by(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """What the probes hold, as `asked` or `normal` has it, and which probe: no training may have it.

    An item that asks something is known by its prompt: what is answered ("I cannot help with that.") may stand in any
    data. Other items are known by their text.
    """
    held: dict[str, str] = {}
    for name, table in tables.items():
        if "prompt" in table:
            keys = [asked(prompt, form) for prompt, form in zip(table["prompt"], table["format"], strict=True)]
        else:
            keys = [normal(text) for text in table["text"]]
        held |= {key: name for key in keys if key not in held}
    return held


def distinct(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """The first item of each key, in order."""
    first: dict[Hashable, Item] = {}
    for item in items:
        first.setdefault(key(item), item)
    return list(first.values())


def components(items: Sequence[Item], links: Callable[[Item], Iterable[Hashable]]) -> list[list[Item]]:
    """Items that share a link, directly or through others, in the order of their first item. Each has at least one."""
    joined = UnionFind()
    for item in items:
        joined.union(*links(item))
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(joined[next(iter(links(item)))], []).append(item)
    return list(found.values())


def share_out(
    groups: Sequence[Sequence[Item]], shares: Mapping[str, float], draw: random.Random
) -> dict[str, list[Sequence[Item]]]:
    """Give every group whole to one of the splits, so that their item counts come as near to `shares` as may be.

    In random order, large groups first: each goes to the split that lacks most of its share.
    """
    total = sum(map(len, groups))
    lacks = {split: share * total for split, share in shares.items()}
    given: dict[str, list[Sequence[Item]]] = {split: [] for split in shares}
    for group in sorted(draw.sample(groups, len(groups)), key=len, reverse=True):
        split = max(lacks, key=lacks.__getitem__)
        given[split].append(group)
        lacks[split] -= len(group)
    return given


def take_exactly(
    groups: Sequence[Sequence[Item]], counts: Mapping[str, int], rest: str
) -> dict[str, list[Sequence[Item]]]:
    """Give groups, in order, to the first split whose count they do not exceed, and what fits nowhere to `rest`."""
    missing = dict(counts)
    given: dict[str, list[Sequence[Item]]] = {split: [] for split in (*counts, rest)}
    for group in groups:
        split = next((name for name, n in missing.items() if len(group) <= n), rest)
        given[split].append(group)
        if split != rest:
            missing[split] -= len(group)
    return given
