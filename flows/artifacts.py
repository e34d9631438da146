"""What a flow run shows of itself in the Prefect UI. Each function is called inside a task or flow run.

What cannot be shown is logged: a server that has gone does not end the work.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL

from flows.server import HOST, MLFLOW_PORT, check_answers
from tasks.addresses import public_uri
from tasks.errors import ServiceError
from tasks.pages import embed_pictures
from tasks.workspace import Workspace

_Given = ParamSpec("_Given")
log = logging.getLogger(__name__)

REPORTS = {
    "validate": ("data-verdict", "Whether the data can be trained on"),
    "reward_model": ("reward-model-report", "How well reward model and judge agree with people"),
    "evaluate": ("alignment-report", "The aligned model against the one it started from"),
}
"""Stages whose report becomes an artifact: key and description."""

FILE_CLOCK = 1.0
"""Seconds: file systems keep a coarser clock than `time.time()`, so a file just written can seem older than now."""
COLUMNS = {
    "cycle": "cycle",
    "dev/judge_win_rate": "judge win rate",
    "dev/reward_gain": "reward gain (sd)",
    "dev/judge_gain": "judge gain (sd)",
    "dev/judge_share": "confirmed share",
    "dev/kl": "KL (nats)",
    "dev/entropy": "entropy",
    "dev/length": "length",
    "dev/distinct_2": "distinct-2",
}
"""Of a cycle's record, what the live table shows."""


def shown(publish: Callable[_Given, None]) -> Callable[_Given, None]:
    """`publish`, left out where Prefect does not answer."""

    @functools.wraps(publish)
    def if_it_answers(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        url = str(PREFECT_API_URL.value())
        try:
            check_answers(url, patience=3)  # a few seconds instead of the client's patience with every call
            publish(*args, **kwargs)
        except (httpx.HTTPError, PrefectException, ServiceError) as error:
            log.warning("not shown in Prefect: %s", error)

    return if_it_answers


@shown
def publish_report(stage: str, workspace: Workspace, since: float) -> None:
    """The stage's `report.md` with its pictures inside, if the stage has one and wrote it after `since` (epoch)."""
    report = workspace.report(stage) / "report.md"
    if stage in REPORTS and report.is_file() and report.stat().st_mtime >= since - FILE_CLOCK:
        key, description = REPORTS[stage]
        description += f". As a page: `{report.with_suffix('.html')}`"
        # The UI cannot read files of this machine.
        markdown = embed_pictures(report.read_text(encoding="utf-8"), report.parent)
        create_markdown_artifact(markdown, key, description)


@shown
def publish_run_link(run_id: str, workspace: Workspace) -> None:
    """Where this training is in MLflow: on its server, or where `make ui` puts one."""
    from tasks.tracking import connect  # MLflow takes seconds to import

    experiment = connect(workspace).get_run(run_id).info.experiment_id
    link = f"{mlflow_address(workspace)}/#/experiments/{experiment}/runs/{run_id}"
    create_link_artifact(
        link, "the run in MLflow", "mlflow-run", "Parameters, curves and models (while `make ui` runs)"
    )


def mlflow_address(workspace: Workspace) -> str:
    """Of MLflow's UI: its server, or where `make ui` puts one."""
    from tasks.tracking import tracking_uri

    store = public_uri(tracking_uri(workspace))
    return store.rstrip("/") if store.startswith("http") else f"http://{HOST}:{MLFLOW_PORT}"


class LiveCycles:
    """A table of the cycles and a progress bar, both brought up to date after every cycle."""

    def __init__(self, cycles: int) -> None:
        self._cycles = cycles
        self._progress: UUID | None = None
        self._table: UUID | None = None

    @shown
    def show(self, records: Sequence[Mapping[str, Any]], stopped: str | None) -> None:
        """`stopped` says why training ended; None while it goes on."""
        done = 100.0 if stopped else 100.0 * len(records) / self._cycles
        if self._progress is None:
            about = f"Cycles of at most {self._cycles}"
            self._progress = _created(create_progress_artifact(done, "ppo-progress", about))
        else:
            update_progress_artifact(self._progress, done)
        if not records:
            return
        rows = [_row(record) for record in records]
        if self._table is None:
            self._table = _created(create_table_artifact(rows, "ppo-cycles", "Cycles of PPO, on the dev prompts"))
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._table, ArtifactUpdate(data=json.dumps(rows)))


def _created(identifier: object) -> UUID:
    assert isinstance(identifier, UUID)  # called outside an event loop, Prefect's functions are not coroutines
    return identifier


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    shown = ((title, record[key]) for key, title in COLUMNS.items() if key in record)
    return {title: _cell(value) for title, value in shown}


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 3) if math.isfinite(value) else None  # JSON knows no other numbers
