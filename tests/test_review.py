"""The flow that waits for a person, against a real Prefect server and a registry in SQLite."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ParameterTypeError
from registered import NAME, aliases, mlflow
from waiting import eventually

from flows import pipeline, review
from tasks.registration import decisions, trail
from tasks.registration.decisions import Statement
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

pytest_plugins = ["flow_server", "registered"]

YES = {"decision": "approve", "reason": "better", "reviewer": "Ada"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "POLL_SECONDS", 0.2)


@pytest.fixture
def place(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose stages have just made version 3 the candidate."""

    def run_stages(workspace: Workspace, force: bool) -> None:
        shelf.metrics("register").parent.mkdir(exist_ok=True)
        shelf.metrics("register").write_text(json.dumps({"model_name": NAME, "model_version": 3}), encoding="utf-8")

    monkeypatch.setattr(pipeline, "_run_stages", run_stages)
    return shelf


def waiting(client: SyncPrefectClient, place: Workspace) -> FlowRun | None:
    """The run of the flow `review` in that workspace once it waits, its form made."""
    paused = [run for run in runs_of(client, review.NAME, place) if run.state_name == "Paused"]
    return paused[0] if paused and "description" in inputs(client, paused[0]) else None


def runs_of(client: SyncPrefectClient, flow: str, place: Workspace) -> list[FlowRun]:
    runs = client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [flow]}))
    return [run for run in runs if run.parameters["workspace"] == str(place.root)]


def inputs(client: SyncPrefectClient, run: FlowRun) -> dict[str, Any]:
    """Schema and description of its form, by kind."""
    found = client.request(
        "POST", "/flow_runs/{id}/input/filter", path_params={"id": run.id}, json={"prefix": "paused", "limit": 9}
    )
    return {row["key"].rpartition("-")[2]: row["value"] for row in found.json()}


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """`work` beside the block, which waits for its end; what it raises is raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    if raised:
        raise raised[0]


def message(client: SyncPrefectClient, place: Workspace) -> str:
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(name={"any_": [pipeline.NAME]}), sort="EXPECTED_START_TIME_DESC"
    )
    run = next(run for run in runs if run.parameters["workspace"] == str(place.root))
    assert run.state_name == "Completed"
    return run.state.message or ""


def test_an_approval_in_the_form_makes_the_champion_and_says_who(place: Workspace, client: SyncPrefectClient) -> None:
    """Through the API that the UI calls; a form without a reason is sent back."""

    def answer() -> None:
        run = eventually(lambda: waiting(client, place), 120)
        with workspace_lock(place):  # another run may begin
            form = inputs(client, run)
        assert "gate passed" in form["description"]
        assert f"/#/models/{NAME}/versions/3" in form["description"]
        assert set(json.loads(form["schema"])["required"]) == {"decision", "reason", "reviewer"}
        assert json.loads(form["schema"])["properties"]["reason"]["maxLength"] == decisions.REASON
        assert client.resume_flow_run(run.id, {**YES, "reason": " "}).status.value == "REJECT"
        assert client.resume_flow_run(run.id, YES).status.value == "ACCEPT"

    with meanwhile(answer):
        assert pipeline.align(None, str(place.root), review=True, review_hours=0.05) == str(place.root)
    assert aliases(place) == {"champion": 3}
    (decision,) = trail.read(mlflow(place), NAME)
    assert (decision.kind, decision.by, decision.reason) == ("promoted", "Prefect: Ada", "better")
    assert "Prefect: Ada: version 3 promoted to champion" in message(client, place)


def test_a_rejection_takes_the_candidate_away(place: Workspace, client: SyncPrefectClient) -> None:
    def answer() -> None:
        run = eventually(lambda: waiting(client, place), 120)
        client.resume_flow_run(run.id, {**YES, "decision": "reject"})

    with meanwhile(answer):
        pipeline.align(None, str(place.root), review=True, review_hours=0.05)
    assert aliases(place) == {}
    assert "version 3 rejected. better" in message(client, place)


@pytest.mark.parametrize("how", ["by command", "by hand"])
def test_a_decision_made_elsewhere_ends_the_waiting(place: Workspace, client: SyncPrefectClient, how: str) -> None:
    def decide() -> None:
        eventually(lambda: waiting(client, place), 120)
        if how == "by command":
            decisions.reject(place, NAME, 3, Statement.of("worse", by="Grace"))
        else:
            mlflow(place).set_registered_model_alias(NAME, "champion", "1")

    with meanwhile(decide):
        pipeline.align(None, str(place.root), review=True, review_hours=0.05)
    said = message(client, place)
    assert "the form changed nothing" in said
    assert ("Grace: version 3 rejected. worse" if how == "by command" else "champion is version 1, set by hand") in said


def test_an_answer_that_comes_late_changes_nothing(place: Workspace, client: SyncPrefectClient) -> None:
    """The registry was changed a moment before, and the waiting has not seen it yet."""
    seen = review._Registry.look(place, NAME)
    decisions.promote(place, NAME, 2, Statement.of("me first", by="Grace"))
    said = review._apply(review.Review(**YES), NAME, 3, place, seen)
    assert "Grace: version 2 promoted to champion" in said
    assert aliases(place) == {"candidate": 3, "champion": 2}


def test_without_an_answer_it_goes_on_being_the_candidate(place: Workspace, client: SyncPrefectClient) -> None:
    pipeline.align(None, str(place.root), review=True, review_hours=0.0001)
    assert aliases(place) == {"candidate": 3}
    said = message(client, place)
    assert "goes on being the candidate: nobody answered within 0.0001 hours" in said
    assert f"`python -m tasks promote 3 --model {NAME} --reason ...`" in said


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 8761])
def test_the_waiting_is_a_time_of_a_year_at_most(hours: float) -> None:
    with pytest.raises(ParameterTypeError, match="review_hours"):
        pipeline.align.validate_parameters({"review_hours": hours})


def test_nobody_is_asked_where_there_is_no_candidate_or_no_wish(place: Workspace, client: SyncPrefectClient) -> None:
    assert pipeline.align(None, str(place.root)) == str(place.root)
    mlflow(place).set_registered_model_alias(NAME, "champion", "3")  # by hand: it bears both
    assert pipeline.align(None, str(place.root), review=True, review_hours=0.05) == str(place.root)
    mlflow(place).delete_registered_model_alias(NAME, "candidate")
    assert pipeline.align(None, str(place.root), review=True, review_hours=0.05) == str(place.root)
    assert runs_of(client, review.NAME, place) == []
