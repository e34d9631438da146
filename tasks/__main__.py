"""`python -m tasks STAGE`: run one stage, as `dvc repro` does. Beside the stages: what people do with their results."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tasks import environment
from tasks.errors import ProximalError
from tasks.params import load_params
from tasks.processes import caller, is_running
from tasks.profiles import profile_file
from tasks.stages import STAGES, run_stage
from tasks.workspace import Workspace
from tasks.workspace_lock import workspace_lock

COMMANDS = {
    "inspect": ("tasks.inspector.command", "look at completions token by token: value, reward, advantage, KL"),
    "versions": ("tasks.registration.versions", "list what is registered, with the decisions on it"),
    "promote": ("tasks.registration.decisions", "make a registered version the champion"),
    "reject": ("tasks.registration.decisions", "record that a version is not to be champion"),
    "rollback": ("tasks.registration.decisions", "put back the champion of before"),
}
"""What is no stage: its module and a line of help. The module offers `arguments(parser)`, which also finds the
command's `name` among the parser's defaults, and `command(args, workspace)`, which returns the exit code."""


EXIT_CODES = (
    "exit codes: 0 ok, 2 config, 3 data, 4 integrity, 5 resume mismatch, 6 locked, 7 training health,\n"
    "8 resources, 9 service, 130 and 143 signals"
)


def main(argv: list[str] | None = None) -> int:
    environment.prepare()  # before MLflow reads its settings
    given = sys.argv[1:] if argv is None else argv
    command = given[0] if given and given[0] in COMMANDS else None
    args = (_command_parser(command) if command else _stage_parser()).parse_args(given[1:] if command else given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    workspace = Workspace(args.workspace.resolve()) if args.workspace else Workspace.here()
    _end_cleanly()
    try:
        if command:
            return int(_module(command).command(args, workspace))
        with workspace_lock(workspace):
            profile = profile_file(args.profile, workspace) if args.profile else None
            run_stage(args.stage, load_params(args.params or workspace.params, args.set, profile), workspace)
    except ProximalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _stage_parser() -> argparse.ArgumentParser:
    others = "\n".join(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of the pipeline on what the stages before it left.",
        epilog=f"commands beside the stages, each with --help of its own:\n{others}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--params", type=Path, help="parameters to use (default: params.yaml of the repository)")
    parser.add_argument("--profile", metavar="NAME", help="lay profiles/NAME.yaml over them, before --set")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one parameter; may be repeated"
    )
    _add_workspace(parser)
    return parser


def _command_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks {name}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(name=name)
    _module(name).arguments(parser)
    _add_workspace(parser)
    parser.description = textwrap.fill(parser.description or "")
    parser.epilog = f"{parser.epilog or ''}\n\n{EXIT_CODES}".strip()
    return parser


def _module(command: str) -> Any:
    """Imported when it is asked for: MLflow takes seconds."""
    return importlib.import_module(COMMANDS[command][0])


def _add_workspace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workspace", type=Path, help="checkout to work in (default: the one of this code)")


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
