"""What Prefect does not do for runs that no worker looks after: notice that their process died, and cancel them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from uuid import UUID

import httpx
from prefect import Flow, State, get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Crashed, Failed

from flows.background import meanwhile
from flows.gpu import LEASE
from tasks.errors import ProximalError
from tasks.processes import is_alive, is_here, process_tags

CANCEL_POLL_SECONDS = 3.0
_OPEN = {"any_": [StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]}

_SIGNALS = {TerminationSignal: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
_CANCEL = (StateType.CANCELLING, StateType.CANCELLED)

log = logging.getLogger(__name__)


@contextmanager
def own_run() -> Iterator[None]:
    """Say with the flow run which process it is, and, where no worker does, watch whether someone cancels it."""
    run_id = UUID(runtime.flow_run.id)
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(run_id, {**process_tags()})
    looked_after = runtime.deployment.id and not runtime.flow_run.parent_flow_run_id  # a worker knows no flow within it
    watching = nullcontext() if looked_after else meanwhile("cancel", partial(_end_if_cancelled, run_id))
    with signals_arrive(), watching:
        yield


@contextmanager
def signals_arrive() -> Iterator[None]:
    """Send a signal again whose exception was raised while Python ran a finalizer: nothing can catch it there."""
    hook = sys.unraisablehook

    def again(lost: sys.UnraisableHookArgs) -> None:
        number = next((number for kind, number in _SIGNALS.items() if issubclass(lost.exc_type, kind)), None)
        if number is None:
            hook(lost)
        else:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook


def close_abandoned(*flow_names: str) -> None:
    """Flow runs of this machine whose process died become Crashed, with their task runs; their GPU slots are freed."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": list(flow_names)}),
            flow_run_filter=FlowRunFilter(state={"type": _OPEN}),
        )
        for run in found:
            tags = {key: str(value) for key, value in run.labels.items()}
            if is_here(tags) and not is_alive(tags):
                _close(client, run)


def failed(error: Exception) -> State:
    """How a flow ends on an error: Prefect would pickle one that leaves it; in a state it is raised to the caller."""
    if not isinstance(error, ProximalError):
        get_run_logger().exception("the flow failed")
    return Failed(message=f"{type(error).__name__}: {error}", data=error)


def record_cancellation(flow: Flow[..., object], flow_run: FlowRun, state: State) -> None:
    """Hook for crashes: Prefect calls a run Crashed that ended on a signal, also where `Cancel` was the reason."""
    with get_client(sync_client=True) as client:
        if any(past.type in _CANCEL for past in client.read_flow_run_states(flow_run.id)):
            client.set_flow_run_state(flow_run.id, Cancelled(message="Cancelled by hand."), force=True)


def _close(client: SyncPrefectClient, run: FlowRun) -> None:
    state: State[None] = Crashed(message="The process that ran this is gone.")
    for task_run in client.read_task_runs(
        flow_run_filter=FlowRunFilter(id={"any_": [run.id]}), task_run_filter=TaskRunFilter(state={"type": _OPEN})
    ):
        client.set_task_run_state(task_run.id, state, force=True)
    if lease := run.labels.get(LEASE):
        client.release_concurrency_slots_with_lease(UUID(str(lease)))
    client.set_flow_run_state(run.id, state, force=True)
    log.info("flow run %s was left open by a process that died; marked Crashed", run.name)


def _end_if_cancelled(run_id: UUID, ended: threading.Event) -> None:
    """Let `Cancel` in the UI end a run that was started by hand, as SIGTERM would."""
    with get_client(sync_client=True) as client:
        while not ended.wait(CANCEL_POLL_SECONDS):
            try:
                state = client.read_flow_run(run_id).state
            except httpx.HTTPError as error:
                log.debug("cannot ask whether the run was cancelled: %s", error)
                continue
            if state is not None and state.type in _CANCEL:
                os.kill(os.getpid(), signal.SIGTERM)
                return
