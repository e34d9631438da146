"""`python -m tasks versions`: what is registered, what it is worth, who decided what on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from tasks.params import load_params
from tasks.registration import registry, trail
from tasks.registration.champion_tags import DIFFERENCE, GATE
from tasks.registration.registry import ModelVersion
from tasks.tracking import connect, service, store_exists
from tasks.workspace import Workspace

_FIGURES = {"judge_win_rate": "judge prefers it", "judge_gain": "judge gain", "kl": "KL"}
"""Tag of a version and its heading. The whole table fits 80 columns."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the registered versions, the newest first: verdict of the gate, main figures (in brackets the difference "
        "to the champion that it was compared with), aliases; below them the decisions of people, from the audit trail."
    )
    model_argument(parser)
    parser.add_argument("--last", type=int, default=10, metavar="N", help="versions and decisions (default: 10)")


def model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="registered model (default: register.model_name of params.yaml)"
    )


def model_name(args: argparse.Namespace, workspace: Workspace) -> str:
    return args.model or load_params(workspace.params).register_.model_name


def command(args: argparse.Namespace, workspace: Workspace) -> int:
    name = model_name(args, workspace)
    console = Console(highlight=False)
    if not store_exists(workspace):
        console.print(f"{name}: nothing is registered yet")
        return 0
    client = connect(workspace)
    with service(client):
        found = registry.versions(client, name)
        newest = [found[number] for number in sorted(found, reverse=True)[: args.last]]
        console.print(_table(client, name, newest) if found else f"{name}: nothing is registered yet")
        for line in (*_decisions(client, name, args.last), *_waiting(client, name)):
            console.print(line, soft_wrap=True, markup=False)
    return 0


def _table(client: MlflowClient, name: str, versions: list[ModelVersion]) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for heading in ("version", "made", "gate", *_FIGURES.values(), "alias"):
        table.add_column(heading)
    aliases = client.get_registered_model(name).aliases if versions else {}
    for version in versions:
        made = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d")
        borne = sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))
        figures = [_figure(version, key) for key in _FIGURES]
        table.add_row(str(version.version), made, version.tags.get(GATE, "–"), *figures, ", ".join(borne))
    return table


def _figure(version: ModelVersion, key: str) -> str:
    difference = version.tags.get(DIFFERENCE + key)
    return version.tags.get(key, "–") + (f" ({difference})" if difference else "")


def _decisions(client: MlflowClient, name: str, last: int) -> Iterator[str]:
    decisions = trail.read(client, name)
    by_hand = trail.by_hand(client, name, decisions)
    if decisions or by_hand:
        yield "\ndecisions"
    for decision in reversed(decisions[-last:]):
        yield f"  {decision}"
    if by_hand:
        yield f"\n{by_hand.words()}. The next decision records this in the audit trail."


def _waiting(client: MlflowClient, name: str) -> Iterator[str]:
    candidate, champion = (registry.with_alias(client, name, a) for a in (registry.CANDIDATE, registry.CHAMPION))
    if candidate and (champion is None or champion.version != candidate.version):
        how = f"python -m tasks promote {candidate.version} --model {name} --reason ..., or reject"
        yield f"\nversion {candidate.version} waits for a decision: {how}"
