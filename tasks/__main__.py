"""`python -m tasks STAGE`: run one stage, as `dvc repro` does."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tasks import environment
from tasks.errors import ProximalError
from tasks.params import load_params
from tasks.stages import STAGES, run_stage
from tasks.workspace import Workspace


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of the pipeline on what the stages before it left.",
        epilog="exit codes: 0 ok, 2 config, 3 data, 4 integrity, 5 resume mismatch, 6 locked, 7 training health, "
        "8 resources, 9 service",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--params", type=Path, help="parameters to use (default: params.yaml of the repository)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one parameter; may be repeated"
    )
    parser.add_argument("--workspace", type=Path, help="checkout to work in (default: the one of this code)")
    args = parser.parse_args(argv)
    environment.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    workspace = Workspace(args.workspace.resolve()) if args.workspace else Workspace.here()
    try:
        run_stage(args.stage, load_params(args.params or workspace.params, args.set), workspace)
    except ProximalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
