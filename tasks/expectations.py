"""What the canonical data must satisfy, as Great Expectations suites built in code, and the running of them.

The sole home of Great Expectations. A suite covers one table; an expectation carries in its `meta` a name, what it
says in plain words, and the mend. Facts that need more than one row or table (is this text in another split too?)
are columns that `tasks.data.facts` derives beforehand.

Great Expectations reports `success=False` for a breach, for a breach that only warns, and for an expectation that
could not be evaluated; `check` keeps the three apart.
"""

# ruff: noqa: E402 (see the line about logging)

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# On import Great Expectations logs a hundred lines about its own construction.
logging.getLogger("great_expectations").setLevel(logging.WARNING)

import great_expectations as gx
import pandas as pd
from great_expectations import expectations as gxe
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnPairMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import ColumnPairMapMetricProvider
from great_expectations.expectations.metrics.map_metric_provider.column_pair_condition_partial import (
    column_pair_condition_partial,
)

from tasks.data.facts import COLUMNS, PAIR_SPLITS, PROMPT_SPLITS
from tasks.params import Params

# This module of theirs sets a level of its own.
logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)

Severity = Literal["critical", "warning"]

MAX_NEAR_TIES = 0.5
"""Warn where raters are split (target within 0.05 of one half) in more pairs than this: little to learn from."""
MAX_SHARED_OPENINGS = 0.1
"""Warn where more prompts than this begin a text of the pairs as well. Of film snippets 4 % do by chance."""
EXAMPLES = 5
"""Offending rows kept of each breach."""
SCHEMA_MEND = "the table is not what this version of ingest writes: run it again"
INGEST_MEND = "ingest should never let this through: run it again, and report it if it comes back"


class _ColumnPairValuesDiffer(ColumnPairMapMetricProvider):  # type: ignore[misc]
    """The metric: texts count as the same if only the space around them differs."""

    condition_metric_name = "column_pair_values.differ"

    @column_pair_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_A: pd.Series, column_B: pd.Series, **_: Any) -> pd.Series:  # noqa: N803, N805
        return column_A.str.strip() != column_B.str.strip()


class ExpectColumnPairValuesToDiffer(ColumnPairMapExpectation):  # type: ignore[misc]
    """In no row are the two texts the same."""

    map_metric = "column_pair_values.differ"
    ignore_row_if: str = "either_value_is_missing"
    domain_keys = ("batch_id", "table", "column_A", "column_B", "ignore_row_if")


@dataclass(frozen=True)
class Example:
    """One offending row: `place` is file:row:field, `value` what is there."""

    place: str
    value: str


@dataclass(frozen=True)
class Finding:
    """What came of one expectation."""

    name: str
    table: str
    says: str
    mend: str
    severity: Severity
    ok: bool
    checked: int | None
    """Rows looked at; None where the expectation is about the table as a whole."""
    failed: int
    """Rows that break it; 1 where the table as a whole does."""
    extent: str
    """How far it is broken: how many rows, or the figure that was found."""
    examples: tuple[Example, ...]

    @property
    def critical(self) -> bool:
        return not self.ok and self.severity == "critical"

    @property
    def warning(self) -> bool:
        return not self.ok and self.severity == "warning"


def check(frames: Mapping[str, pd.DataFrame], suites: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """Run each table's suite on its frame and report in their order. A frame's column `place` says where a row lies.

    Raises RuntimeError if an expectation cannot be evaluated: with the schema checked first, that is our own error.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    tables = context.data_sources.add_pandas("canonical")
    findings: list[Finding] = []
    for table, suite in suites.items():
        batch = tables.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        validation = batch.get_batch({"dataframe": frames[table]}).validate(
            gx.ExpectationSuite(table, expectations=list(suite)),
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["place"]},
        )
        # Great Expectations returns results in an order of its own.
        found = {finding.name: finding for finding in (_finding(table, result) for result in validation.results)}
        findings += [found[expectation.meta["name"]] for expectation in suite]
    return findings


def schema_suite(table: str) -> list[Any]:
    """On one row a column of the table's file: `column`, and `found` ("margin: double"; empty for a foreign column)."""
    columns = COLUMNS[table]
    allowed = [f"{column}: {kind}" for column, kinds in columns.items() for kind in kinds]
    return [
        _expect(gxe.ExpectColumnDistinctValuesToEqualSet, f"{table}.columns", f"the columns are {', '.join(columns)}",
                SCHEMA_MEND, column="column", value_set=list(columns)),
        _expect(gxe.ExpectColumnValuesToBeInSet, f"{table}.types", "every column is of its type", SCHEMA_MEND,
                column="found", value_set=allowed, field=""),
    ]  # fmt: skip


def pairs_suite(params: Params) -> list[Any]:
    """On pairs.parquet with the derived columns unreadable_prompt, opposite, longer_wins, near_tie and probe."""
    limits, tokens = params.validation, params.ingest.max_text_tokens
    longer, shorter = limits.max_longer_wins, 1 - limits.max_longer_wins
    return [
        *_common("pairs", PAIR_SPLITS),
        *(_expect(gxe.ExpectColumnValuesToMatchRegex, f"pairs.not_blank.{column}", f"{column} is not blank",
                  "write the text or remove the row from its source", column=column, regex=r"\S")
          for column in ("chosen", "rejected")),
        _expect(ExpectColumnPairValuesToDiffer, "pairs.chosen_differs", "chosen and rejected differ",
                "remove the pair from its source: it says nothing", column_A="chosen", column_B="rejected"),
        _expect(gxe.ExpectCompoundColumnsToBeUnique, "pairs.unique", "no pair occurs twice",
                "remove the repeated rows from the source", column_list=["prompt", "chosen", "rejected", "split"],
                ignore_row_if="any_value_is_missing"),
        _expect(gxe.ExpectColumnValuesToBeNull, "pairs.no_contradictions",
                f"at most {limits.max_contradictions:.1%} of the pairs also occur the other way round",
                "decide which way round is right, or raise validate.max_contradictions",
                column="opposite", mostly=1 - limits.max_contradictions, field="chosen,rejected"),
        *(_within("pairs", column, 1, tokens,
                  "shorten or drop the text, or raise ingest.max_text_tokens (memory and time grow with it)")
          for column in ("chosen_tokens", "rejected_tokens")),
        _within("pairs", "margin", 0, limits.max_margin,
                "margins are rating gaps: correct the source, or set validate.max_margin to the width of its scale"),
        _within("pairs", "target", 0, 1, "targets are shares of raters: correct the source"),
        _expect(gxe.ExpectColumnMeanToBeBetween, "pairs.longer_wins",
                f"the longer text wins in at most {longer:.0%} of the pairs, and in at least {shorter:.0%}",
                "length would be the lesson: balance the pairs by length, or watch length in the evaluation",
                severity="warning", column="longer_wins", min_value=min(longer, shorter), max_value=longer),
        _expect(gxe.ExpectColumnValuesToBeInSet, "pairs.near_ties",
                f"raters are split about evenly in at most {MAX_NEAR_TIES:.0%} of the pairs",
                "raise ingest.pairing.min_gap", severity="warning", column="near_tie", value_set=[False],
                mostly=1 - MAX_NEAR_TIES, field="target"),
    ]  # fmt: skip


def prompts_suite(params: Params) -> list[Any]:
    """On prompts.parquet with the derived columns unreadable_prompt, begins_a_text and probe."""
    return [
        *_common("prompts", PROMPT_SPLITS),
        _expect(gxe.ExpectCompoundColumnsToBeUnique, "prompts.unique", "no prompt occurs twice in a split",
                INGEST_MEND, column_list=["prompt", "split"], ignore_row_if="any_value_is_missing"),
        _within("prompts", "tokens", 1, params.ingest.max_prompt_tokens,
                "shorten or drop the prompt, or raise ingest.max_prompt_tokens"),
        _expect(gxe.ExpectColumnValuesToBeInSet, "prompts.openings_apart",
                f"at most {MAX_SHARED_OPENINGS:.0%} of the prompts are how a text of the pairs begins",
                "more than chance: see whether these openings come from texts that the reward model or the judge knows",
                severity="warning", column="begins_a_text", value_set=[False], mostly=1 - MAX_SHARED_OPENINGS,
                field="prompt"),
    ]  # fmt: skip


def texts_suite() -> list[Any]:
    """On every occurrence of a text or a non-empty prompt, with the derived columns text_splits and group_splits."""
    return [
        _expect(gxe.ExpectColumnValuesToBeNull, "splits.text_in_one", "no text and no prompt is in two splits",
                INGEST_MEND, column="text_splits", field=""),
        _expect(gxe.ExpectColumnValuesToBeNull, "splits.group_in_one",
                "texts that hang together (pairs, a shared prompt, an opening and its text) are in one split",
                INGEST_MEND, column="group_splits", field=""),
    ]  # fmt: skip


def sources_suite() -> list[Any]:
    """On one row a source: its mean target."""
    return [
        _expect(gxe.ExpectColumnValuesToBeBetween, "sources.chosen_preferred",
                "in every source raters prefer the chosen text more often than not",
                "chosen and rejected look exchanged in this source", column="mean_target", min_value=0.5, field=""),
    ]  # fmt: skip


def splits_suite(params: Params) -> list[Any]:
    """On one row a split that holds pairs: their number under `training_pairs` or `held_out_pairs`."""
    least = params.validation.min_pairs
    mend = "add data, widen the split in ingest.splits, or lower validate.min_pairs"
    return [
        _expect(gxe.ExpectColumnValuesToBeBetween, "splits.enough_training",
                f"at least {least} pairs each to train the reward model and the judge", mend,
                column="training_pairs", min_value=least, field=""),
        _expect(gxe.ExpectColumnValuesToBeBetween, "splits.enough_held_out",
                f"at least {least} pairs each to measure the reward model and the judge",
                f"their accuracy will be uncertain: {mend}", severity="warning",
                column="held_out_pairs", min_value=least, field=""),
    ]  # fmt: skip


def _common(table: str, splits: Sequence[str]) -> list[Any]:
    key = next(iter(COLUMNS[table]))
    return [
        *(_expect(gxe.ExpectColumnValuesToNotBeNull, f"{table}.present.{column}", f"{column} is never missing",
                  INGEST_MEND, column=column) for column in COLUMNS[table]),
        _expect(gxe.ExpectColumnValuesToBeUnique, f"{table}.id_unique", f"{key} names one row", INGEST_MEND,
                column=key),
        _expect(gxe.ExpectColumnValuesToBeInSet, f"{table}.format_known", "format is text or chat", INGEST_MEND,
                column="format", value_set=["text", "chat"]),
        _expect(gxe.ExpectColumnValuesToBeInSet, f"{table}.split_known", f"split is one of {', '.join(splits)}",
                INGEST_MEND, column="split", value_set=list(splits)),
        _expect(gxe.ExpectColumnDistinctValuesToContainSet, f"{table}.splits_filled", "every split has rows",
                "too little data for ingest.splits: add data or change the shares", column="split",
                value_set=list(splits)),
        _expect(gxe.ExpectColumnValuesToBeNull, f"{table}.prompt_readable",
                "a text prompt is not blank; a chat prompt is a JSON list of messages with role and content",
                "correct the prompt in its source", column="unreadable_prompt", field="prompt"),
        _expect(gxe.ExpectColumnValuesToBeNull, f"{table}.not_probed", "no prompt or text is one that a probe holds",
                f"nothing may train on what measures it; {INGEST_MEND}", column="probe", field=""),
    ]  # fmt: skip


def _within(table: str, column: str, low: float, high: float, mend: str) -> Any:
    return _expect(gxe.ExpectColumnValuesToBeBetween, f"{table}.{column}", f"{column} is between {low} and {high:g}",
                   mend, column=column, min_value=low, max_value=high)  # fmt: skip


def _expect(
    kind: Any, name: str, says: str, mend: str, severity: Severity = "critical", field: str | None = None, **more: Any
) -> Any:
    """An expectation with what a person wants to know. `field` names what to look at where the column is derived."""
    return kind(**more, severity=severity, meta={"name": name, "says": says, "mend": mend, "field": field})


def _finding(table: str, result: Any) -> Finding:
    meta, outcome = result.expectation_config.meta, result.result
    error = _exception(result.exception_info)
    if error:
        raise RuntimeError(f"{meta['name']} could not be evaluated: {error}")
    checked = outcome.get("element_count")
    return Finding(
        name=meta["name"],
        table=table,
        says=meta["says"],
        mend=meta["mend"],
        severity=result.expectation_config.severity.value,
        ok=bool(result.success),
        checked=checked,
        failed=int(not result.success) if checked is None else outcome["unexpected_count"],
        extent=_extent(outcome),
        examples=tuple(_example(row, meta["field"]) for row in outcome.get("unexpected_index_list", [])[:EXAMPLES]),
    )


def _example(row: Mapping[str, Any], field: str | None) -> Example:
    values = {column: value for column, value in row.items() if column != "place"}
    field = ",".join(values) if field is None else field
    return Example(f"{row['place']}:{field}".rstrip(":"), " | ".join(map(str, values.values())).strip() or "(blank)")


def _exception(info: Mapping[str, Any]) -> str | None:
    """The message, if evaluation raised. Great Expectations nests the record by metric where a metric raised."""
    for record in (info, *(value for value in info.values() if isinstance(value, Mapping))):
        if record.get("raised_exception"):
            return str(record.get("exception_message"))
    return None


def _extent(outcome: Mapping[str, Any]) -> str:
    """How many rows break it; else the mean, or the values that are missing from a set or foreign to it."""
    if "element_count" in outcome:
        return f"{outcome['unexpected_count']:,} of {outcome['element_count']:,} rows break it"
    if isinstance(outcome.get("observed_value"), float):
        return f"found {outcome['observed_value']:.3g}"
    differences = {"missing": outcome.get("partial_missing_list"), "foreign": outcome.get("partial_unexpected_list")}
    return "; ".join(f"{kind}: {', '.join(values)}" for kind, values in differences.items() if values)
