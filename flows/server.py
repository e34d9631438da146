"""The Prefect API that a run reports to: the configured one, that of a running `make ui`, or one of our own."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import httpx
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.leash import leashed
from tasks.addresses import public_uri
from tasks.errors import ServiceError

HOST = "127.0.0.1"
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
"""Of `make ui`."""
ANSWER_SECONDS = 10
"""How long a configured server may take to answer before it counts as gone."""
START_SECONDS = 120
"""How long one of our own may take: the first start creates the data base, and the machine may be busy."""

log = logging.getLogger(__name__)


@contextmanager
def prefect_api(log_file: Path, meanwhile: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of an API that answers, set as PREFECT_API_URL within the block.

    `meanwhile` is done while a server of our own starts. Raises ServiceError where the configured one does not answer
    or our own does not start (`log_file` says why).
    """
    with ExitStack() as stack:
        configured, url = get_current_settings().api.url, api_url(PREFECT_PORT)
        if configured:
            check_answers(url := configured)
        elif not shares_our_history(url):
            url = api_url(port := free_port())
            server = stack.enter_context(leashed(prefect_command(port), log_file, prefect_environment(port)))
            meanwhile()
            wait_until(lambda: is_healthy(url), server, "Prefect", log_file)
        stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
        stack.callback(deliver)
        yield url


def deliver() -> None:
    """Send what waits in Prefect's queues, as far as that is quickly done.

    Left alone it would happen when the interpreter ends: when our server has gone, and for minutes where another has.
    """
    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def running_api() -> str:
    """The API of a server that goes on when we end. Raises ServiceError where there is none."""
    configured = get_current_settings().api.url
    url = configured or api_url(PREFECT_PORT)
    if configured or is_healthy(url):
        check_answers(url)
        return url
    mend = "start one with `make ui`, or set PREFECT_API_URL"
    raise ServiceError("no Prefect server is running", public_uri(url), mend)


def prefect_command(port: int) -> list[str]:
    """The server with its services and UI, on loopback."""
    factory = "prefect.server.api.server:create_app"
    options = {"host": HOST, "port": port, "log-level": "error", "lifespan": "on", "timeout-graceful-shutdown": 2}
    return [sys.executable, "-m", "uvicorn", "--factory", factory, *(f"--{k}={v}" for k, v in options.items())]


def prefect_environment(port: int) -> Mapping[str, str]:
    """Without this, a UI on another port than 4200 asks the API on 4200."""
    return {"PREFECT_UI_API_URL": api_url(port), "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"}


def api_url(port: int) -> str:
    return f"http://{HOST}:{port}/api"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def shares_our_history(url: str) -> bool:
    """Whether a Prefect server answers there that keeps its data where one of our own would."""
    try:
        settings = httpx.get(f"{url}/admin/settings", timeout=2).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return False
    return bool(settings.get("home") == str(get_current_settings().home))


def check_answers(url: str, patience: float | None = None) -> None:
    """Raises ServiceError unless the API is healthy within `patience` seconds, by default ANSWER_SECONDS."""
    deadline = time.monotonic() + (ANSWER_SECONDS if patience is None else patience)
    while not is_healthy(url):
        if time.monotonic() > deadline:
            mend = "start that server, or unset PREFECT_API_URL"
            raise ServiceError("Prefect does not answer", public_uri(url), mend)
        time.sleep(0.5)


def wait_until(healthy: Callable[[], bool], server: Popen[bytes], name: str, log_file: Path) -> None:
    """Wait for a server that has just been started. Raises ServiceError where it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not healthy():
        if server.poll() is not None or time.monotonic() > deadline:
            told = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = told[-1] if told else f"it said nothing for {START_SECONDS} s"
            raise ServiceError(f"the {name} server did not start: {why}", str(log_file), "read there what it said")
        time.sleep(0.1)
