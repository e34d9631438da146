"""Data of the evaluation's probes: a table a probe, none of which is trained on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd

from ppo_core.seeds import derive
from tasks.data.canonical import Item as Feedback
from tasks.data.canonical import Lengths, digest, texts_of
from tasks.data.probe_formats import Ask, Choices, Item, Labelled, Plain, Statements, read_items
from tasks.data.rows import BadRows
from tasks.data.sources import Fetched, files_of
from tasks.data.splits import asked, distinct, normal, share_out
from tasks.data_params import IngestParams, ProbeSource
from tasks.errors import DataError, Problem, ProximalError
from tasks.workspace import Workspace

Row = dict[str, Any]


@dataclass(frozen=True)
class ProbeData:
    """What the probes hold."""

    tables: dict[str, pd.DataFrame]
    read: list[tuple[str, ProbeSource, Fetched, int]]
    """Probe, source, what was fetched, and how many items it gave: for the provenance record."""
    left_out: int
    """Bad rows."""

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name, table in self.tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)

    @property
    def counts(self) -> dict[str, int]:
        """Items of each probe: of questions and comparisons, not their answers; of statements, each."""
        return {name: table["item"].nunique() for name, table in self.tables.items()}


def read_probes(params: IngestParams, workspace: Workspace, scratch: Path, lengths: Lengths, seed: int) -> ProbeData:
    """Fetch and check everything that `ingest.probes` names. Raises DataError with the bad rows of all its files."""
    tables: dict[str, pd.DataFrame] = {}
    read: list[tuple[str, ProbeSource, Fetched, int]] = []
    left_out, problems = 0, []
    for name, sources in params.probes.named().items():
        items: list[Item] = []
        for i, source in enumerate(sources):
            try:
                fetched, found, dropped = _read(name, source, params, workspace, scratch, lengths)
            except ProximalError as error:
                mend = "mend it, or remove it: then its figures are reported as not measured"
                problems += [*error.problems, Problem("cannot be used", f"ingest.probes.{name}.{i}", mend)]
                if not isinstance(error, DataError):  # a service that is away will not answer the next question either
                    raise type(error)(problems) from error
                continue
            read.append((name, source, fetched, len(found)))
            items += found
            left_out += dropped
        if items:
            tables[name] = _table(name, items, params, seed)
    if problems:
        raise DataError(problems)
    return ProbeData(tables, read, left_out)


def apart(feedback: Sequence[Feedback], held: Collection[str]) -> list[Feedback]:
    """The feedback that has no text or prompt in common with the probes."""
    taken = set(held)
    return [item for item in feedback if not taken & {*texts_of(item), asked(item.prompt, item.format)}]


def _read(
    name: str, source: ProbeSource, params: IngestParams, workspace: Workspace, scratch: Path, lengths: Lengths
) -> tuple[Fetched, list[Item], int]:
    """What was fetched, the good items, and how many bad rows were left out."""
    fetched, files = files_of(source, workspace, scratch)
    found = [BadRows(file.label) for file in files]
    rows = chain.from_iterable(
        ((bad, item) for item in read_items(name, file, source, bad)) for file, bad in zip(files, found, strict=True)
    )
    limits = params.max_prompt_tokens, params.probes.max_text_tokens
    items = [item for bad, item in islice(rows, source.max_rows) if _fits(item, limits, lengths, bad)]
    left_out = sum(bad.settle(source.bad_rows == "drop") for bad in found)
    if not items:
        raise DataError("holds no usable rows", fetched.label, "check the file, `format` and `columns` in params.yaml")
    return fetched, items, left_out


def _fits(item: Item, limits: tuple[int, int], lengths: Lengths, bad: BadRows) -> bool:
    """Whether the policy can read what it is asked or what it is to judge."""
    before = bad.problems
    if isinstance(item, Ask | Choices | Labelled):
        try:
            prompt = lengths.prompt(item.prompt, item.format)
        except ValueError as error:
            bad.add(item.row, str(error), "use a model with a chat template, or set `chat: false`", "prompt")
            return False
        if isinstance(item, Ask) and prompt > limits[0]:
            what = f"is {prompt} tokens long, allowed are {limits[0]}"
            bad.add(item.row, what, "leave it out, or raise ingest.max_prompt_tokens", "prompt")
    else:
        prompt = lengths.prompt("", "text")
    for column, text in _read_by_policy(item):
        if (tokens := prompt + lengths.response(text)) > limits[1]:
            what = f"is with its prompt {tokens} tokens long, allowed are {limits[1]}"
            bad.add(item.row, what, "leave it out, or raise ingest.probes.max_text_tokens", column)
    return bad.problems == before


def _read_by_policy(item: Item) -> Iterator[tuple[str, str]]:
    """Texts whose log-probability is asked for, each with its field."""
    if isinstance(item, Choices):
        yield from ((side, text) for side in ("right", "wrong") for text in getattr(item, side))
    elif isinstance(item, Statements):
        yield from ((side, text) for side in ("right", "wrong") if (text := getattr(item, side)))
    elif isinstance(item, Plain):
        yield "text", item.text


def _table(name: str, items: Sequence[Item], params: IngestParams, seed: int) -> pd.DataFrame:
    different = distinct(items, _same)
    if name == "harm_labels" and params.probes.harm_label_share < 1:
        different = _share(different, params.probes.harm_label_share, seed)
    return pd.DataFrame([row for item in different for row in _rows(item)])


def _same(item: Item) -> tuple[str, ...]:
    """What two items have in common that ask the same; of a reply that is labelled twice, the first label counts."""
    return tuple(
        normal(str(cell)) for row in _rows(item) for name, cell in row.items() if name not in ("item", "label")
    )


def _share(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """A share of the labelled replies: all to a prompt, or none."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        assert isinstance(item, Labelled), "only label sets are shared"
        groups[asked(item.prompt, item.format)].append(item)
    draw = random.Random(derive(seed, "harm labels"))
    given = share_out(list(groups.values()), {"probes": share, "training": 1 - share}, draw)
    return [item for group in given["probes"] for item in group]


def _rows(item: Item) -> list[Row]:
    """The rows of an item in its table: one, or one an answer or statement."""
    if isinstance(item, Plain):
        return [{"item": digest(item.text), "text": item.text}]
    if isinstance(item, Statements):
        pair = {"item": digest(item.right, item.wrong)}
        return [pair | row for row in _answers((item.right,), (item.wrong,))]
    asked_for = {"format": item.format, "prompt": item.prompt}
    if isinstance(item, Ask):
        return [{"item": digest(item.format, item.prompt)} | asked_for]
    if isinstance(item, Labelled):
        named = {"item": digest(item.format, item.prompt, item.response)}
        return [named | asked_for | {"response": item.response, "label": item.label}]
    named = {"item": digest(item.format, item.prompt, *item.right, *item.wrong)}
    more = {"subset": item.subset, "canary": item.canary}
    return [named | asked_for | row | more for row in _answers(item.right, item.wrong)]


def _answers(right: Iterable[str], wrong: Iterable[str]) -> list[Row]:
    both = (*((text, True) for text in right), *((text, False) for text in wrong))
    return [{"text": text, "correct": correct} for text, correct in both if text]
