"""`python -m flows.align`: the whole pipeline in one command, with a Prefect server for as long as it takes."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from tasks import environment

environment.prepare()  # before Prefect reads its settings

import httpx  # noqa: E402
from prefect.settings import PREFECT_API_URL  # noqa: E402

from flows.server import prefect_api  # noqa: E402
from tasks.errors import ProximalError, ServiceError  # noqa: E402
from tasks.params import load_params  # noqa: E402
from tasks.profiles import profile_file  # noqa: E402
from tasks.workspace import Workspace  # noqa: E402
from tasks.workspace_lock import workspace_lock  # noqa: E402

EPILOG = """\
examples:
  python -m flows.align                                    run what is not up to date, with params.yaml
  python -m flows.align --set ppo.cycles=4                 the same with one parameter changed
  python -m flows.align --set ppo.reward.kl_coef=0.1 --set seed=3
  python -m flows.align --params experiments/small.yaml    with parameters from another file
  python -m flows.align --profile harmless-cpu             with what profiles/harmless-cpu.yaml says over params.yaml
  python -m flows.align --review                           if there is a candidate, wait for a person to decide on it

Parameters other than those of params.yaml run in a git worktree of their own, which shares the cache of DVC and the
records in MLflow; that of a profile is work/worktrees/NAME. Edit params.yaml to change what the checkout itself holds.
Interrupt with Ctrl-C and run the same command again: it continues after the last finished cycle.

The run reports to the Prefect server of PREFECT_API_URL if that is set, else to the one of `make ui` if that is
running, else to a server that it starts and ends itself; in the last two cases `make ui` shows its history.

exit codes: 0 ok, 2 config, 3 data, 4 integrity, 5 resume mismatch, 6 locked, 7 training health, 8 resources,
9 service, 130 interrupted, 143 terminated
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Where Prefect has no handler of its own: while the server starts, and after the flow has ended.
    signal.signal(signal.SIGTERM, terminate)
    try:
        return _run(args)
    except ProximalError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where this run ended", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    here = Workspace.here()
    profile = profile_file(args.profile, here) if args.profile else None
    params = load_params(args.params or here.params, args.set, profile)
    if params == load_params(here.params):
        with workspace_lock(here):  # told at once, not when a server has started; the flow takes it again
            pass
    print("connecting to Prefect (a server of our own takes some seconds to start) ...", flush=True)
    with prefect_api(here.work / "prefect_server.log", meanwhile=_import_libraries):
        from flows.pipeline import align, place

        try:
            # Made here, so that the flow finds in it what `--set` says over the profile.
            where = place(params, here, args.profile) if args.profile else here
            root = align(None if args.profile else params, str(where.root), args.force, review=args.review)
        except httpx.TransportError as error:
            mend = "what was done is kept: the same command says so, and does the rest"
            raise ServiceError(
                f"Prefect went away during the run ({error})", str(PREFECT_API_URL.value()), mend
            ) from error
    assert isinstance(root, str)  # a state would have been raised
    from flows.closing import show_result

    show_result(Workspace(Path(root)))
    return 0


def _import_libraries() -> None:
    """What is needed in every case, also to find that there is nothing to do: seconds that the server takes anyway."""
    for module in ("flows.pipeline", "tasks.versioning", "tasks.tracking"):
        importlib.import_module(module)


def terminate(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.align",
        description="Align a language model to human preferences: ingest, validate, reward_model, ppo, evaluate, "
        "register. A stage whose inputs, parameters and outputs are as they were is skipped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one parameter; may be repeated"
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help="parameters to use instead of params.yaml")
    parser.add_argument("--profile", metavar="NAME", help="lay profiles/NAME.yaml over them, before --set")
    parser.add_argument("--force", action="store_true", help="run every stage, also those that are up to date")
    parser.add_argument(
        "--review",
        action="store_true",
        help="wait for a person to approve or reject the candidate, in a form in Prefect",
    )
    return parser


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status == ServiceError.exit_code:
        os._exit(status)  # else Prefect offers each of its messages to a server that has gone, for minutes
    sys.exit(status)
