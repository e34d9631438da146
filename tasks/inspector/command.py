"""`python -m tasks inspect`: a page on which completions are looked at token by token. It needs what ppo left."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tasks.errors import ConfigError, DataError
from tasks.inspector import drawing, inspection
from tasks.inspector.inspection import COMPLETIONS, Prompt
from tasks.params import Params, load_params
from tasks.seals import check_inputs
from tasks.stages import machine_errors
from tasks.workspace import Workspace

SPLIT = "dev"
"""Whoever looks at test prompts chooses by them, and what they measure is no longer held out."""
PROMPTS = 3
"""Drawn where none are named."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Sample several completions of a prompt from the aligned policy, and draw what PPO sees in them: value, "
        "reward, advantage and KL of every token."
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help='a prompt, as text or as a JSON array of {"role", "content"}; may be repeated',
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=_numbers, metavar="0,5,9",
        help=f"which dev prompts, counted from 0 (default: {PROMPTS} drawn by the seed)",
    )  # fmt: skip
    parser.add_argument(
        "--completions", type=_positive, default=COMPLETIONS, metavar="K",
        help=f"of each prompt (default: {COMPLETIONS})",
    )  # fmt: skip
    parser.add_argument(
        "--cycle",
        type=int,
        metavar="N",
        help="the policy as it was after this cycle; 0: the reference (default: the result)",
    )
    parser.add_argument("--out", type=Path, help="the page (default: reports/inspect/inspect.html)")
    parser.add_argument("--params", type=Path, help="parameters to use (default: params.yaml of the repository)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one parameter; may be repeated"
    )


def command(args: argparse.Namespace, workspace: Workspace) -> int:
    """Write the page and print where it is."""
    params = load_params(args.params or workspace.params, args.set)
    if not workspace.policy.is_dir():
        raise DataError("is missing", "models/policy", "train one first: `make align`, or `dvc repro ppo`")
    check_inputs("evaluate", workspace)
    with machine_errors("evaluate", workspace):  # whose inputs these are
        prompts = _prompts(args, params, workspace)
        inspected = inspection.inspect(params, workspace, prompts, args.completions, args.cycle)
    out: Path = args.out or workspace.report("inspect") / "inspect.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(drawing.page(inspected), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(out), "name another file with --out") from error
    print(out)
    return 0


def _prompts(args: argparse.Namespace, params: Params, workspace: Workspace) -> list[Prompt]:
    if args.prompt:
        return [Prompt.of(text) for text in args.prompt]
    if args.rows is None:
        return inspection.drawn_prompts(params, workspace, SPLIT, PROMPTS)
    there = inspection.split_prompts(workspace, SPLIT)
    if beyond := [row for row in args.rows if row >= len(there)]:
        raise ConfigError(f"no row {beyond[0]}", "--rows", f"{SPLIT} has rows 0 to {len(there) - 1}")
    return [there[row] for row in args.rows]


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of rows such as 0,5,9")
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)
