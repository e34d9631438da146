"""The validate stage: the canonical data against its expectations, and a report that a person can act on.

In: pairs.parquet, prompts.parquet, data/probes. Out: reports/validate (report.html, report.md, pictures),
metrics/validate.json.
Critical breaches raise DataError after both are written; warnings do not stop the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import expectations
from tasks.data.facts import COLUMNS, Tables, derive, describe
from tasks.data.splits import held_by
from tasks.errors import DataError, Problem
from tasks.expectations import Finding, check
from tasks.params import Params
from tasks.reports.data import write_report
from tasks.stages import StageResult, write_metrics
from tasks.workspace import Workspace


def run(params: Params, workspace: Workspace) -> StageResult:
    """Check the canonical data. Raises DataError that names every critical breach and its first offending rows."""
    findings, tables = examine(params, workspace)
    figures = describe(tables) if tables else {}
    write_report(workspace.report("validate"), findings, tables, figures)
    result = StageResult(_metrics(findings, figures), _summary(findings))
    breaches = [finding for finding in findings if finding.critical]
    if breaches:
        write_metrics("validate", result, workspace)
        raise DataError([_problem(finding) for finding in breaches])
    return result


def examine(params: Params, workspace: Workspace) -> tuple[list[Finding], Tables]:
    """What came of every expectation, and the tables it was asked of: none if already the schema does not hold."""
    files = (workspace.pairs, workspace.prompts)
    findings = check(
        {path.stem: _schema(path) for path in files},
        {path.stem: expectations.schema_suite(path.stem) for path in files},
    )
    # With the wrong columns or types every further question would be nonsense or an exception.
    if not all(finding.ok for finding in findings):
        return findings, {}
    probes = {path.stem: pd.read_parquet(path) for path in sorted(workspace.probes.glob("*.parquet"))}
    tables = derive(pd.read_parquet(workspace.pairs), pd.read_parquet(workspace.prompts), held_by(probes))
    return findings + check(tables, _suites(params)), tables


def _suites(params: Params) -> dict[str, list[Any]]:
    """The suites on the tables of `derive`."""
    return {
        "pairs": expectations.pairs_suite(params),
        "prompts": expectations.prompts_suite(params),
        "texts": expectations.texts_suite(),
        "sources": expectations.sources_suite(),
        "splits": expectations.splits_suite(params),
    }


def _schema(path: Path) -> pd.DataFrame:
    """One row a column of the file. Raises DataError if there is no such file or it is no Parquet."""
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise DataError("no such file", str(path), "run `python -m tasks ingest` first") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"is not Parquet: {error}", str(path), "run `python -m tasks ingest` again") from error
    known = COLUMNS[path.stem]
    return pd.DataFrame(
        {
            "place": [f"{path.name}:{column.name}" for column in schema],
            "column": schema.names,
            "found": [f"{column.name}: {column.type}" if column.name in known else None for column in schema],
        }
    )


def _metrics(findings: Sequence[Finding], figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "expectations": {
            "checked": len(findings),
            "passed": sum(finding.ok for finding in findings),
            "warnings": sum(finding.warning for finding in findings),
            "critical": sum(finding.critical for finding in findings),
        },
        "failed": {finding.name: finding.failed for finding in findings if not finding.ok},
        **figures,
    }


def _summary(findings: Sequence[Finding]) -> str:
    critical, warnings = (
        [f.name for f in findings if f.critical],
        [f.name for f in findings if f.warning],
    )
    return "; ".join(
        [
            f"{sum(f.ok for f in findings)} of {len(findings)} expectations hold",
            *([f"broken: {', '.join(critical)}"] if critical else []),
            *([f"warnings: {', '.join(warnings)}"] if warnings else []),
        ]
    )


def _problem(finding: Finding) -> Problem:
    where = ", ".join(example.place for example in finding.examples) or f"{finding.table}.parquet"
    return Problem(f"{finding.name}: expected that {finding.says}, but {finding.extent}", where, finding.mend)
