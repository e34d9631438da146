"""The flow `review`: a person decides on the candidate in a form of Prefect's UI, or elsewhere, or not in time.

A flow of its own within `align`: from a run that pauses Prefect takes the slot of its deployment, and then ends it for
having no slot. While it waits, workspace and GPU are free, as the stages have ended; the slot of the deployment of
`align` is not, so where that has one, its next run queues.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import httpx
from prefect import State, flow, pause_flow_run, runtime
from prefect.client.orchestration import get_client
from prefect.input import RunInput
from prefect.states import Completed
from prefect.utilities.urls import url_for
from pydantic import Field

from flows import lifecycle
from flows.artifacts import mlflow_address
from flows.background import meanwhile
from tasks.errors import ProximalError
from tasks.pages import markdown_table
from tasks.registration.champion_tags import DIFFERENCE, FIGURES, GATE, VERSION
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from tasks.registration.trail import Decision

NAME = "review"
REVIEW_HOURS = 72.0
POLL_SECONDS = 10
GRACE_SECONDS = 3600
"""The server fails a pause that is over; we end it before that."""
log = logging.getLogger(__name__)


class Review(RunInput):
    """The form."""

    decision: Literal["approve", "reject", "later"] = Field(
        description="approve: it becomes the champion. reject: it is no longer the candidate. later: it stays the "
        "candidate, and this run ends."
    )
    reason: str = Field(pattern=r"\S", max_length=1000, description="Why; for the audit trail in the registry.")
    reviewer: str = Field(pattern=r"\S", max_length=100, description="Who decides; for the audit trail.")


@flow(
    name=NAME,
    flow_run_name="review of {name} version {version}",
    persist_result=False,
    on_crashed=[lifecycle.record_cancellation],
)
def wait_for_decision(name: str, version: int, workspace: str, hours: float) -> State:
    """Wait for a person, then promote or reject as they say.

    Args:
        name: Registered model.
        version: Its candidate.
        workspace: Checkout whose registry holds it.
        hours: How long to wait. After that it goes on being the candidate.

    Returns what became of it, in words (str).
    """
    try:
        with lifecycle.own_run():
            said = _ask(name, version, Workspace(Path(workspace)), hours)
            log.info("%s", said)
            return Completed(message=said, data=said)
    except Exception as error:
        return lifecycle.failed(error)


def waiting_candidate(workspace: Workspace) -> tuple[str, int] | None:
    """Registered model and version that the register stage left here, if that waits for a decision."""
    registered = json.loads(workspace.metrics("register").read_text(encoding="utf-8"))
    name, version = registered["model_name"], int(registered["model_version"])
    now = _Registry.look(workspace, name)
    return (name, version) if now.candidate == version != now.champion else None


@dataclass(frozen=True)
class _Registry:
    """What a reviewer looks at."""

    candidate: int | None
    champion: int | None
    decisions: list[Decision]
    by_hand: Decision | None

    @classmethod
    def look(cls, workspace: Workspace, name: str) -> _Registry:
        from tasks.registration import registry, trail  # MLflow takes seconds to import
        from tasks.tracking import connect, service

        client = connect(workspace)
        with service(client):
            candidate, champion = (
                registry.with_alias(client, name, a) for a in (registry.CANDIDATE, registry.CHAMPION)
            )
            decisions = trail.read(client, name)
            by_hand = trail.by_hand(client, name, decisions)
        return cls(
            int(candidate.version) if candidate else None,
            int(champion.version) if champion else None,
            decisions,
            by_hand,
        )

    def changes(self, before: _Registry) -> str | None:
        """What was done since then that leaves nothing to answer, in words; None if nothing was."""
        if (self.candidate, self.champion) == (before.candidate, before.champion):
            return None
        if self.by_hand and self.champion != before.champion:
            return self.by_hand.words()
        if new := self.decisions[len(before.decisions) :]:
            return str(new[-1])
        return f"the candidate is {_called(self.candidate)} now, the champion {_called(self.champion)}"


def _ask(name: str, version: int, workspace: Workspace, hours: float) -> str:
    seen = _Registry.look(workspace, name)
    run_id = UUID(runtime.flow_run.id)
    log.info("%s version %d waits for a decision: %s", name, version, url_for("flow-run", run_id))
    ending = partial(_end, run_id, workspace, name, seen, hours)
    with meanwhile("review", ending):
        answer = pause_flow_run(
            wait_for_input=Review.with_initial_data(description=_form(name, version, workspace)),
            timeout=int(hours * 3600) + GRACE_SECONDS,
            poll_interval=POLL_SECONDS,
        )
    return _apply(answer, name, version, workspace, seen)


def _form(name: str, version: int, workspace: Workspace) -> str:
    """What stands above the form: verdict, where to read more, main figures. Prefect cuts it at some 400 pixels."""
    from tasks.tracking import connect, service

    client = connect(workspace)
    with service(client):
        tags = client.get_model_version(name, str(version)).tags
    rows = [[label, tags.get(key), tags.get(DIFFERENCE + key)] for key, label in FIGURES.items()]
    figures = markdown_table(["Figure", "Value", "To champion"], rows)
    page = f"{mlflow_address(workspace)}/#/models/{name}/versions/{version}"
    return (
        f"**{name} version {version}**: gate {tags.get(GATE)}. Champion compared with: {tags.get(VERSION)}.\n\n"
        f"Read first: [its page in MLflow]({page}) (`make ui`), the report among the "
        f"[artifacts]({url_for('flow-run', runtime.flow_run.root_flow_run_id)}).\n\n{figures}"
    )


def _end(run_id: UUID, workspace: Workspace, name: str, seen: _Registry, hours: float, ended: threading.Event) -> None:
    """Answer "later" in nobody's name once there is nothing left to answer, or no time."""
    deadline = time.monotonic() + hours * 3600
    with get_client(sync_client=True) as client:
        while not ended.wait(POLL_SECONDS):
            try:
                why = _Registry.look(workspace, name).changes(seen)
                if time.monotonic() > deadline:
                    why = f"nobody answered within {hours:g} hours"
                if why:
                    client.resume_flow_run(run_id, {"decision": "later", "reason": why[:1000], "reviewer": "nobody"})
            except (httpx.HTTPError, ProximalError) as error:
                log.debug("cannot see whether the review is over: %s", error)


def _apply(answer: Review, name: str, version: int, workspace: Workspace, seen: _Registry) -> str:
    """Do what the form says, unless the registry is no longer what it was when the form was made."""
    from tasks.registration.decisions import NOBODY, Statement, promote, reject

    if changed := _Registry.look(workspace, name).changes(seen):
        return f"{name} version {version}: the form changed nothing, it was decided elsewhere: {changed}"
    if answer.decision == "later":
        how = f"`python -m tasks promote {version} --model {name} --reason ...` or `reject`"
        return f"{name} version {version} goes on being the candidate: {answer.reason}; decide with {how}"
    statement = Statement.of(answer.reason, f"Prefect: {answer.reviewer}", str(seen.champion or NOBODY))
    decide = promote if answer.decision == "approve" else reject
    return f"{name}: {decide(workspace, name, version, statement)}"


def _called(version: int | None) -> str:
    return f"version {version}" if version else "none"
