"""`python -m flows.serve`: put the flow on a schedule, and run what is due or started in the UI, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from tasks import environment

environment.prepare()  # before Prefect reads its settings

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy  # noqa: E402
from prefect.deployments.runner import RunnerDeployment  # noqa: E402
from prefect.flows import serve  # noqa: E402
from prefect.schedules import Cron  # noqa: E402
from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: E402
from prefect.types.entrypoint import EntrypointType  # noqa: E402
from tzlocal import get_localzone_name  # noqa: E402

from flows.server import running_api  # noqa: E402
from tasks.errors import ProximalError  # noqa: E402
from tasks.params import dump_params, load_params  # noqa: E402
from tasks.workspace import Workspace  # noqa: E402

DAILY = "0 2 * * *"
NAME = "nightly"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.chdir(Workspace.here().root)  # Prefect looks for the code of a run in the working directory
    try:
        url = running_api()
        with temporary_settings({PREFECT_API_URL: url}):
            print(f"deployment align/{NAME}: {url.removesuffix('/api')}/deployments", flush=True)
            serve(deployment(args.cron, args.timezone, args.review), limit=args.limit)
    except ProximalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def deployment(cron: str, timezone: str, review: bool = False) -> RunnerDeployment:
    """The flow with a form of all parameters for runs by hand, and a schedule that follows params.yaml.

    With `review` its runs wait for a person where there is a candidate; the form can change that for a run.
    Runs of it queue behind each other. While nothing serves it, the schedule is paused.
    """
    from flows.pipeline import align

    made = align.to_deployment(
        name=NAME,
        description="Alignment with the parameters of params.yaml; a run by hand may change any of them.",
        schedule=Cron(cron, timezone=timezone, parameters={"params": None}, slug="by-params-yaml"),
        parameters=default_parameters() | {"review": review},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # called outside an event loop, it is not a coroutine
    return made


def default_parameters() -> dict[str, Any]:
    """What the form shows: the values of params.yaml as they are now. prefect.yaml calls it as a step."""
    return {"params": dump_params(load_params(Workspace.here().params))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve",
        description="Put the flow on a schedule in Prefect's UI and run it when it is due, or when someone starts it "
        "there. Needs a server that is running: `make ui`, or the one of PREFECT_API_URL.",
    )
    parser.add_argument("--cron", default=DAILY, help="when to run, default: '%(default)s', daily at 2 in the night")
    parser.add_argument("--timezone", default=get_localzone_name(), help="of --cron, default: this machine's")
    parser.add_argument(
        "--review", action="store_true", help="runs that made a candidate wait for a person to approve or reject it"
    )
    parser.add_argument(
        "--limit", type=int, default=1, help="runs at the same time, default: %(default)s; the rest queue"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
