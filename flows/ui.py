"""`python -m flows.ui`: the dashboards of Prefect and MLflow on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from urllib.parse import urlsplit

from tasks import environment

environment.prepare()  # before Prefect and MLflow read their settings

import httpx  # noqa: E402
import psutil  # type: ignore[import-untyped]  # noqa: E402
from prefect.settings import get_current_settings  # noqa: E402

from flows import server  # noqa: E402
from flows.align import terminate  # noqa: E402
from flows.leash import leashed  # noqa: E402
from tasks.addresses import public_uri  # noqa: E402
from tasks.errors import ProximalError, ResourceError, ServiceError  # noqa: E402
from tasks.workspace import Workspace  # noqa: E402


@dataclass(frozen=True)
class Dashboard:
    """A server and how to know that it is up. Without a command it is someone else's, and only linked to."""

    name: str
    url: str
    api: str
    """Path below which `/health` answers."""
    command: list[str] = field(default_factory=list)
    env: Mapping[str, str] = field(default_factory=dict)

    def is_up(self) -> bool:
        return server.is_healthy(self.url + self.api)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with ExitStack() as stack:
            _serve(stack, _dashboards(Workspace.here(), args.prefect_port, args.mlflow_port), Workspace.here().work)
    except ProximalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped")
    return 0


def _serve(stack: ExitStack, dashboards: list[Dashboard], logs: Path) -> None:
    """Start what is ours, say where everything is, and wait."""
    for dashboard in dashboards:
        _check(dashboard)
    print("starting ...", flush=True)
    # All at once, then one after another until they answer.
    started = [
        (dashboard, log := logs / f"{dashboard.name.lower()}_ui.log", _start(stack, dashboard, log))
        for dashboard in dashboards
        if dashboard.command
    ]
    for dashboard, log, child in started:
        server.wait_until(dashboard.is_up, child, dashboard.name, log)
    for label, link in _links(*(dashboard.url for dashboard in dashboards)):
        print(f"  {label:<18} {public_uri(link)}", flush=True)
    print("Ctrl-C ends what was started here" if started else "both servers were running already", flush=True)
    while started:
        time.sleep(1)
        for dashboard, log, child in started:
            if child.poll() is not None:
                raise ServiceError(f"the {dashboard.name} server ended", str(log), "it says why")


def _start(stack: ExitStack, dashboard: Dashboard, log: Path) -> Popen[bytes]:
    return stack.enter_context(leashed(dashboard.command, log, dashboard.env))


def _dashboards(workspace: Workspace, prefect_port: int, mlflow_port: int) -> list[Dashboard]:
    """Prefect's and MLflow's: ours on loopback, or those that the environment names."""
    from tasks.tracking import tracking_uri  # MLflow takes seconds to import

    if configured := get_current_settings().api.url:
        prefect = Dashboard("Prefect", configured.rstrip("/").removesuffix("/api"), "/api")
    else:
        command, env = server.prefect_command(prefect_port), server.prefect_environment(prefect_port)
        prefect = Dashboard("Prefect", f"http://{server.HOST}:{prefect_port}", "/api", command, env)
    store = tracking_uri(workspace)
    if store.startswith(("http://", "https://")):
        return [prefect, Dashboard("MLflow", store.rstrip("/"), "")]
    artifacts = (workspace.main_root / "mlartifacts").as_uri()
    options = ["--host", server.HOST, "--port", str(mlflow_port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *options, "--artifacts-destination", artifacts]
    # The address of a data base may hold a password, and every user of the machine can read a command line.
    env = {"MLFLOW_BACKEND_STORE_URI": store}
    return [prefect, Dashboard("MLflow", f"http://{server.HOST}:{mlflow_port}", "", command, env)]


def _links(prefect: str, mlflow: str) -> Iterator[tuple[str, str]]:
    from tasks.tracking import EXPERIMENT

    yield "Prefect runs", f"{prefect}/runs"
    yield "Prefect artifacts", f"{prefect}/artifacts"
    # Without workflowType the UI opens for chat agents, where training runs and their registry are hidden.
    machine_learning = "workflowType=machine_learning"
    found = httpx.get(
        f"{mlflow}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": EXPERIMENT}, timeout=10
    )
    if found.is_success:
        experiment = found.json()["experiment"]["experiment_id"]
        yield "MLflow runs", f"{mlflow}/#/experiments/{experiment}/runs?{machine_learning}"
        yield "MLflow models", f"{mlflow}/#/experiments/{experiment}/models?{machine_learning}"
    else:
        yield "MLflow", f"{mlflow}/#/experiments?{machine_learning}   (no run yet: make align)"
    yield "registry", f"{mlflow}/#/models?{machine_learning}"


def _check(dashboard: Dashboard) -> None:
    """Raises ResourceError that names who listens on a port of ours, ServiceError where another's server is away."""
    if not dashboard.command:
        if not dashboard.is_up():
            where = public_uri(dashboard.url)
            raise ServiceError(f"{dashboard.name} does not answer", where, "start it, or unset its address")
        return
    port = urlsplit(dashboard.url).port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            holder = f"process {connection.pid}, {_command(connection.pid)}" if connection.pid else "another process"
            other = f"end that, or choose another port with --{dashboard.name.lower()}-port"
            raise ResourceError(f"is taken by {holder}", f"port {port}", other)


def _command(pid: int) -> str:
    try:
        return public_uri(" ".join(psutil.Process(pid).cmdline()))[:100]
    except psutil.Error:
        return "which does not show its command"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.ui",
        description="Start the dashboards of Prefect and MLflow on loopback, print where they are, and end both on "
        "Ctrl-C. A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is linked to instead of started.",
    )
    parser.add_argument("--prefect-port", type=int, default=server.PREFECT_PORT, help="default: %(default)s")
    parser.add_argument("--mlflow-port", type=int, default=server.MLFLOW_PORT, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
