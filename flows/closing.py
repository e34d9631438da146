"""The last screen of a run: what improved, by how much, and where to look."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.registration.champion_tags import BREACHED, EVALUATE_AGAIN, GATE, OTHER
from tasks.workspace import Workspace

_FIGURES = (
    ("judge prefers it", "judge_win_rate", "{:.1%}", "of prompts (chance: 50%)"),
    ("judge's score", "judge_gain", "{:+.2f}", "sd of human text"),
    ("reward model's score", "reward_gain", "{:+.2f}", "sd; what PPO maximised"),
    ("judge's over reward's", "judge_share", "{:.2f}", "near 0: reward gamed"),
    ("KL to the reference", "kl", "{:.1f}", "nats: how far it moved"),
)
"""Name, key in metrics/evaluate.json, form and unit. The whole table fits 80 columns."""
_STOPPED = {"cycles": "all cycles done", "target": "target reached", "kl_budget": "KL budget spent"}


def show_result(workspace: Workspace, console: Console | None = None) -> None:
    """Print figures, verdict and places from what the stages left in metrics/."""
    console = console or Console(highlight=False)
    evaluation, ppo, registered = (_read(workspace, stage) for stage in ("evaluate", "ppo", "register"))
    console.print()
    if evaluation:
        console.print(_figures(evaluation))
        console.print()
        for key, reason in evaluation.get("not_measured", {}).items():
            console.print(f"  {key}: not measured: {reason}", soft_wrap=True, markup=False)
    for label, text in _lines(workspace, ppo, registered):
        console.print(f"  {label:<11} {text}", soft_wrap=True, markup=False)


def _lines(workspace: Workspace, ppo: Mapping[str, Any], registered: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if ppo:
        why = _STOPPED.get(ppo["stopped_by"], ppo["stopped_by"])
        yield "trained", f"{ppo['cycles']} cycles ({why}); cycle {ppo['result_cycle']} is the result"
    if registered:
        yield "registered", _verdict(registered)
    yield "report", str(workspace.report("evaluate") / "report.html")
    yield "model", str(workspace.policy)
    yield "dashboards", "make ui   (Prefect: runs and artifacts; MLflow: metrics, models, registry)"
    if workspace.root != Workspace.here().root:
        yield "worktree", f"{workspace.root}   (git worktree remove --force, when you are done)"


def _figures(metrics: Mapping[str, Any]) -> Table:
    title = f"The aligned model against the one it started from, {metrics['n']} test prompts"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for heading in ("", "change", "95% interval", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, key, form, meaning in _FIGURES:
        if key in metrics:
            low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
            interval = f"{form.format(low)} to {form.format(high)}" if low is not None and high is not None else ""
            table.add_row(label, form.format(metrics[key]), interval, meaning)
    return table


def _verdict(registered: Mapping[str, Any]) -> str:
    version = f"{registered['model_name']} version {registered['model_version']}"
    if registered.get(OTHER):
        return f"{version}: has no alias: {EVALUATE_AGAIN}"
    if registered[GATE] == "passed":
        how = f"python -m tasks versions --model {registered['model_name']}"
        return f"{version}: passed the gate; who decides on it: {how}"
    return f"{version}: did not pass the gate ({', '.join(registered[BREACHED])}), so it has no alias"


def _read(workspace: Workspace, stage: str) -> dict[str, Any]:
    path = workspace.metrics(stage)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
