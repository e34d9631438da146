"""Stage `ingest`: fetch what params.yaml names, check it, and write the canonical data and the base models."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.data.canonical import Item, Lengths, build, without_duplicates
from tasks.data.formats import Preference, RatedText, read_feedback, read_rated_tables
from tasks.data.probe_data import apart, read_probes
from tasks.data.rows import BadRows
from tasks.data.scored import BarePrompt, read_prompts, read_replies
from tasks.data.sources import Fetched, fetch, files_of
from tasks.data.splits import held_by
from tasks.data_params import DataSource, IngestParams, ProbeSource, SourceParams
from tasks.errors import DataError, Problem
from tasks.models.base_models import write_judge, write_policy, write_reward
from tasks.params import Params
from tasks.seals import seal
from tasks.stages import StageResult
from tasks.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Read:
    """The good rows of one data source."""

    source: DataSource
    fetched: Fetched
    items: list[Item]
    left_out: int


def run(params: Params, workspace: Workspace) -> StageResult:
    """Write data/canonical and models/*base; on any error what was there before stays as it was."""
    ingest = params.ingest
    with _scratch(workspace) as scratch:
        base, canonical = scratch / "base", scratch / "canonical"
        judge_base, reward_base, probes = scratch / "judge_base", scratch / "reward_base", scratch / "probes"
        named = {"policy": ingest.policy, "adapter": ingest.adapter, "judge": ingest.judge, "reward": ingest.reward}
        sources = {name: source for name, source in named.items() if source is not None}
        models = {name: fetch(source, workspace, scratch) for name, source in sources.items()}
        lengths = Lengths(write_policy(models["policy"], base, ingest, workspace, models.get("adapter")))
        write_judge(models["judge"], judge_base)
        write_reward(models.get("reward"), reward_base)
        read = [_read(source, ingest, workspace, scratch, lengths) for source in ingest.data]
        feedback = without_duplicates(item for part in read for item in part.items)
        asking = read_probes(ingest, workspace, scratch, lengths, params.seed)
        held = held_by(asking.tables)
        free = apart(feedback, held)
        pairs, prompts = map(pd.DataFrame, build(free, ingest, params.seed, lengths, held))
        asking.write(probes)
        canonical.mkdir()
        pairs.to_parquet(canonical / workspace.pairs.name, index=False)
        prompts.to_parquet(canonical / workspace.prompts.name, index=False)
        origins = [
            *(_origin(name, sources[name], fetched) for name, fetched in models.items()),
            *(_data_origin("data", part.source, part.fetched, len(part.items)) for part in read),
            *(_data_origin(f"probe {name}", source, fetched, n) for name, source, fetched, n in asking.read),
        ]
        (canonical / workspace.provenance.name).write_text(json.dumps(origins, indent=2) + "\n", encoding="utf-8")
        result = _result(read, len(feedback), pairs, prompts)
        result.metrics.update({"probes": asking.counts, "probe_rows_dropped": asking.left_out})
        result.metrics.update({"left_to_the_probes": len(feedback) - len(free)})
        places = {canonical: workspace.canonical, probes: workspace.probes, base: workspace.base_model}
        places |= {judge_base: workspace.judge_base, reward_base: workspace.reward_base}
        for folder in places:
            seal(folder)
        _put_in_place(places, scratch)
    return result


def _read(source: DataSource, params: IngestParams, workspace: Workspace, scratch: Path, lengths: Lengths) -> _Read:
    """Raises DataError that lists the bad rows of each file, up to twenty."""
    fetched, files = files_of(source, workspace, scratch)
    found: list[BadRows] = []
    rows = chain.from_iterable(_rows(source, file, workspace, scratch, found) for file in files)
    items = [_marked(item, source) for bad, item in islice(rows, source.max_rows) if _fits(item, params, lengths, bad)]
    left_out = _settled(found, source.bad_rows == "drop")
    if not items:
        raise DataError("holds no usable rows", fetched.label, "check the file, and `format` in params.yaml")
    log.info("%s: %d rows", fetched.label, len(items))
    return _Read(source, fetched, items, left_out)


def _rows(
    source: DataSource, file: Fetched, workspace: Workspace, scratch: Path, found: list[BadRows]
) -> Iterator[tuple[BadRows, Item]]:
    """The good rows of a file, each beside where what is wrong with it belongs; that is added to `found`, too."""
    bad = BadRows(file.label)
    found.append(bad)
    rows: Iterator[Item]
    if source.ratings_file:
        ratings = fetch(source, workspace, scratch, file=source.ratings_file)
        found.append(BadRows(ratings.label))
        rows = read_rated_tables(file.path, bad, ratings.path, found[-1])
    elif source.format == "scored":
        rows = read_replies(file.path, source, bad, -1 if source.higher_is_worse else 1)
    elif source.format == "prompts":
        rows = read_prompts(file.path, source, bad)
    else:
        rows = read_feedback(file.path, source.format, bad, source.comment)
    yield from ((bad, row) for row in rows)


def _marked(item: Item, source: DataSource) -> Item:
    """The item with where it is from."""
    if isinstance(item, BarePrompt):
        return replace(item, source=source.source)
    return replace(item, source=source.source, reward=source.reward)


def _settled(found: Iterable[BadRows], drop: bool) -> int:
    """How many rows are left out. Raises DataError with what is wrong in all files."""
    problems: list[Problem] = []
    left_out = 0
    for bad in found:
        try:
            left_out += bad.settle(drop)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return left_out


def _fits(item: Item, params: IngestParams, lengths: Lengths, bad: BadRows) -> bool:
    """Whether the policy can read the row; a silent cut would change what people rated."""
    before = bad.rows
    try:
        prompt = lengths.prompt(item.prompt, item.format)
    except ValueError as error:
        bad.add(item.row, str(error), "use a model with a fitting template, or mend the row", "prompt")
        return False
    if item.prompt and prompt > params.max_prompt_tokens:
        what = f"is {prompt} tokens long, allowed are {params.max_prompt_tokens}"
        bad.add(item.row, what, "shorten it, or raise ingest.max_prompt_tokens", "prompt")
        return False
    for column, text in _answers(item).items():
        if (tokens := prompt + lengths.response(text)) > params.max_text_tokens:
            what = f"is with its prompt {tokens} tokens long, allowed are {params.max_text_tokens}"
            bad.add(item.row, what, "shorten it, or raise ingest.max_text_tokens", column)
    return bad.rows == before


def _answers(item: Item) -> dict[str, str]:
    if isinstance(item, Preference):
        return {"chosen": item.chosen, "rejected": item.rejected}
    return {"text": item.text} if isinstance(item, RatedText) else {}


def _origin(name: str, source: SourceParams, fetched: Fetched) -> dict[str, Any]:
    return {
        "name": name,
        "source": source.source,
        "version": fetched.version,
        "file": source.file or fetched.label,
        "sha256": fetched.sha256,
        "licence": source.licence,
        "rows": None,
        "format": "peft" if name == "adapter" else "gguf" if fetched.path.suffix == ".gguf" else "transformers",
    }


def _data_origin(name: str, source: DataSource | ProbeSource, fetched: Fetched, rows: int) -> dict[str, Any]:
    return _origin(name, source, fetched) | {"rows": rows, "format": source.format}


@contextmanager
def _scratch(workspace: Workspace) -> Iterator[Path]:
    """A folder on the same file system as the outputs, gone afterwards; what a killed run left is removed."""
    workspace.work.mkdir(parents=True, exist_ok=True)
    for stale in workspace.work.glob("ingest-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=workspace.work, prefix="ingest-") as folder:
        yield Path(folder)


def _put_in_place(places: dict[Path, Path], scratch: Path) -> None:
    for new, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.replace(scratch / f"old-{place.name}")
        new.replace(place)


def _result(read: Iterable[_Read], texts: int, pairs: pd.DataFrame, prompts: pd.DataFrame) -> StageResult:
    rows = sum(len(part.items) for part in read)
    metrics = {
        "rows": rows,
        "duplicates_dropped": rows - texts,
        "bad_rows_dropped": sum(part.left_out for part in read),
        "pairs": {"all": len(pairs), **_counts(pairs)},
        "prompts": {"all": len(prompts), **_counts(prompts)},
        "mean_margin": float(pairs["margin"].mean()),
        "mean_target": float(pairs["target"].mean()),
    }
    return StageResult(metrics, f"{rows} rows gave {len(pairs)} pairs and {len(prompts)} prompts")


def _counts(table: pd.DataFrame) -> dict[str, int]:
    return {str(split): int(n) for split, n in table["split"].value_counts(sort=False).items()}
