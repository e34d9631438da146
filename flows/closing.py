"""The last screen of a run: what improved, by how much, and where to look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.workspace import Workspace

_FIGURES = (
    ("judge prefers the aligned model", "judge_win_rate", "{:.1%}", "of prompts; 50% is no difference"),
    ("judge's score rose by", "judge_gain", "{:+.2f}", "standard deviations of human-written text"),
    ("reward model's score rose by", "reward_gain", "{:+.2f}", "the same; training maximised it"),
    ("of which the judge confirms", "judge_share", "{:.0%}", "under half would mean that the reward is being gamed"),
    ("KL to the reference", "kl", "{:.1f}", "nats a response: how far the model moved"),
)
_STOPPED = {"cycles": "all cycles done", "target": "target reached", "kl_budget": "KL budget spent"}


def show_result(workspace: Workspace, console: Console | None = None) -> None:
    """Print figures, verdict and places from what the stages left in metrics/."""
    console = console or Console(highlight=False)
    evaluation, ppo, registered = (_read(workspace, stage) for stage in ("evaluate", "ppo", "register"))
    console.print()
    if evaluation:
        console.print(_figures(evaluation))
    if ppo:
        why = _STOPPED.get(ppo["stopped_by"], ppo["stopped_by"])
        console.print(f"  trained     {ppo['cycles']} cycles ({why}); cycle {ppo['result_cycle']} is the result")
    if registered:
        console.print(f"  registered  {_verdict(registered)}")
    console.print(f"  report      {workspace.report('evaluate') / 'report.html'}", soft_wrap=True)
    console.print(f"  model       {workspace.policy}", soft_wrap=True)
    console.print("  dashboards  make ui   (Prefect: runs and artifacts; MLflow: metrics, models, registry)")
    if workspace.root != Workspace.here().root:
        console.print(
            f"  worktree    {workspace.root}   (git worktree remove --force, when you are done)", soft_wrap=True
        )


def _figures(metrics: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"Aligned model against its reference, {metrics.get('n', '?')} test prompts", title_justify="left"
    )
    for heading in ("", "", "95 % interval", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key, form, meaning in _FIGURES:
        if key in metrics:
            low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
            interval = f"{form.format(low)} to {form.format(high)}" if low is not None and high is not None else ""
            table.add_row(label, form.format(metrics[key]), interval, meaning)
    return table


def _verdict(registered: Mapping[str, Any]) -> str:
    version = f"{registered['model_name']} version {registered['model_version']}"
    if registered["gate"] == "passed":
        return f"{version}: passed the gate, alias candidate; it awaits your review"
    return f"{version}: did not pass the gate ({', '.join(registered['breached'])}), so it has no alias"


def _read(workspace: Workspace, stage: str) -> dict[str, Any]:
    path = workspace.metrics(stage)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
