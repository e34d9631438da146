"""`python -m tasks STAGE`: run one stage, as `dvc repro` does."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tasks import environment
from tasks.errors import ProximalError
from tasks.params import load_params
from tasks.processes import caller, is_running
from tasks.profiles import profile_file
from tasks.stages import STAGES, run_stage
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of the pipeline on what the stages before it left.",
        epilog="exit codes: 0 ok, 2 config, 3 data, 4 integrity, 5 resume mismatch, 6 locked, 7 training health, "
        "8 resources, 9 service, 130 and 143 signals",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--params", type=Path, help="parameters to use (default: params.yaml of the repository)")
    parser.add_argument("--profile", metavar="NAME", help="lay profiles/NAME.yaml over them, before --set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one parameter; may be repeated"
    )
    parser.add_argument("--workspace", type=Path, help="checkout to work in (default: the one of this code)")
    args = parser.parse_args(argv)
    environment.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    workspace = Workspace(args.workspace.resolve()) if args.workspace else Workspace.here()
    _end_cleanly()
    try:
        with workspace_lock(workspace):
            profile = profile_file(args.profile, workspace) if args.profile else None
            run_stage(args.stage, load_params(args.params or workspace.params, args.set, profile), workspace)
    except ProximalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _end_cleanly() -> None:
    """SIGTERM unwinds the stage, so that its record is closed. DVC passes no signal on: its stage ends when it does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_end_with, args=(caller(),), daemon=True).start()


def _end_with(process: psutil.Process | None) -> None:
    while process is not None and is_running(process):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
