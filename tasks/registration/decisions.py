"""The decision of a person on a registered version: `python -m tasks promote|reject|rollback VERSION --reason ...`.

Whoever decides waits for their turn, looks at the registry anew, moves the alias and then writes the trail. If that is
cut short after the alias, the next look finds an alias that was moved outside of this tool, and says so; the same
decision can be made again and then tells who and why.
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow import MlflowClient

from tasks.errors import ConfigError, IntegrityError
from tasks.pages import excerpt
from tasks.registration import model_card, registry, trail
from tasks.registration.champion_tags import BREACHED, GATE
from tasks.registration.registry import ModelVersion
from tasks.registration.trail import Decision
from tasks.registration.versions import model_argument, model_name
from tasks.tracking import connect, service, store_exists
from tasks.workspace import Workspace
from tasks.workspace_lock import in_turn

REASON, NAME = 1000, 200
"""Characters of a reason and of who decides: the trail has room for them, whatever they are."""
NOBODY = "none"
"""How a champion is named where there is none."""
DECISION = "decision"
"""Tag of a version: the last decision about it, in words."""
TAG = 500
"""Characters of that tag that every version of MLflow takes."""


@dataclass(frozen=True)
class Statement:
    """What the person says who decides."""

    reason: str
    by: str
    expected: str | None = None
    """The champion that they looked at (its number, or "none"); None where they do not say."""
    despite_gate: bool = False
    """That they know of the gate's verdict."""

    @classmethod
    def of(
        cls, reason: str, by: str | None = None, expected: str | None = None, despite_gate: bool = False
    ) -> Statement:
        """Raises ConfigError where it does not say what the trail needs."""
        why, who = _plain(reason), _plain(by if by is not None else account())
        for where, text, limit in (("--reason", why, REASON), ("--by", who, NAME)):
            if not text:
                raise ConfigError("is empty", where, "the audit trail needs who and why")
            if len(text) > limit:
                mend = f"at most {limit}: put the long story elsewhere and name the place"
                raise ConfigError(f"has {len(text):,} characters", where, mend)
        return cls(why, who, expected, despite_gate)


def promote(workspace: Workspace, name: str, version: int, statement: Statement) -> Decision:
    """Make the version champion, after its files were read again and compared with the digest of their registration.

    A version that failed the gate needs `despite_gate`. One that was made champion by hand can be promoted, too: that
    says who is behind it. Raises ConfigError for what cannot be meant, IntegrityError where files or champion are not
    what they were, ServiceError where MLflow does not answer.
    """
    with _turn(workspace, name, statement) as turn:
        registered, replaced = turn.version(version), turn.champion
        if replaced == version:
            chosen = trail.chosen(version, turn.decisions)
            if chosen is None or chosen.kind != "set by hand":
                raise ConfigError("is the champion already", turn.place(version), f"see {turn.how('versions')}")
            replaced = chosen.replaced
        breached = _breached(registered)
        if breached and not statement.despite_gate:
            mend = "choose another version, or say --despite-gate: the audit trail will say so, too"
            raise ConfigError(f"failed the gate ({breached})", turn.place(version), mend)
        registry.verify_recorded(turn.client, registered)
        return turn.decide("promoted", version, version, replaced, breached)


def reject(workspace: Workspace, name: str, version: int, statement: Statement) -> Decision:
    """Record that the version is not to be champion, and take the alias `candidate` from it if it bears it.

    Raises as `promote` does.
    """
    with _turn(workspace, name, statement) as turn:
        turn.version(version)
        if turn.champion == version:
            mend = f"to take it out of service: {turn.how(f'rollback {version} --reason ...')}"
            raise ConfigError("is the champion", turn.place(version), mend)
        return turn.decide("rejected", version, turn.champion, turn.champion)


def rollback(workspace: Workspace, name: str, version: int, statement: Statement) -> Decision:
    """Put a former champion back: the one that `version` replaced if that is champion now, else `version` itself.

    Raises as `promote` does.
    """
    with _turn(workspace, name, statement) as turn:
        target = turn.former(version)
        registry.verify_recorded(turn.client, turn.version(target))
        return turn.decide("rolled back", target, target, turn.champion)


@dataclass
class _Turn:
    """The registry as it is while nobody else of this checkout and its worktrees decides."""

    client: MlflowClient
    name: str
    decisions: list[Decision]
    statement: Statement

    @property
    def champion(self) -> int | None:
        return self.decisions[-1].champion if self.decisions else None

    def place(self, version: int) -> str:
        return f"{self.name} version {version}"

    def how(self, command: str) -> str:
        return f"`python -m tasks {command} --model {self.name}`"

    def version(self, number: int) -> ModelVersion:
        found = registry.versions(self.client, self.name)
        if number not in found:
            there = ", ".join(map(str, sorted(found))) or "none; run the register stage"
            raise ConfigError(f"there is no such version (there are: {there})", self.place(number))
        return found[number]

    def former(self, version: int) -> int:
        """The champion to put back."""
        if self.champion == version:
            chosen = trail.chosen(version, self.decisions)
            if chosen is None or chosen.replaced is None:
                raise ConfigError("replaced no champion", self.place(version), "name a version that was champion")
            return chosen.replaced
        if not any(version in (d.champion, d.replaced) for d in self.decisions):
            self.version(version)
            raise ConfigError("was never champion", self.place(version), self.how(f"promote {version} --reason ..."))
        return version

    def decide(
        self, kind: trail.Kind, version: int, champion: int | None, replaced: int | None, breached: str = ""
    ) -> Decision:
        """Move the aliases, write the trail, and say it on the pages of the versions that it is about."""
        if champion is not None and champion != self.champion:
            self.client.set_registered_model_alias(self.name, registry.CHAMPION, str(champion))
        candidate = registry.with_alias(self.client, self.name, registry.CANDIDATE)
        if candidate is not None and int(candidate.version) == version:
            self.client.delete_registered_model_alias(self.name, registry.CANDIDATE)
        said = self.statement
        decision = Decision(kind, version, champion, replaced, said.by, trail.utc_now(), said.reason, breached)
        trail.append(self.client, self.name, decision)
        self.decisions.append(decision)
        for number in registry.versions(self.client, self.name).keys() & {version, replaced}:
            self._show(number)
        return decision

    def _show(self, number: int) -> None:
        """The decisions about a version, on its page and in its tags."""
        about = [str(decision) for decision in trail.about(number, self.decisions)]
        card = model_card.reviewed(self.client.get_model_version(self.name, str(number)).description or "", about)
        self.client.update_model_version(self.name, str(number), description=card)
        self.client.set_model_version_tag(self.name, str(number), DECISION, excerpt(about[-1], TAG))


@contextmanager
def _turn(workspace: Workspace, name: str, statement: Statement) -> Iterator[_Turn]:
    """Raises IntegrityError where the champion is another than the one that the person looked at."""
    if not store_exists(workspace):
        raise ConfigError("nothing is registered yet", name, "`make align` does that")
    client = connect(workspace)
    with service(client), in_turn(workspace.registry_lock):
        turn = _Turn(client, name, trail.caught_up(client, name), statement)
        now = str(turn.champion or NOBODY)
        if statement.expected not in (None, now):
            said = f"; {turn.decisions[-1].words()}" if turn.decisions else ""
            mend = f"look again ({turn.how('versions')}), then decide"
            raise IntegrityError(f"champion is {now}, not {statement.expected}{said}", name, mend)
        yield turn


def _breached(version: ModelVersion) -> str:
    """The breached rules; empty where the gate passed."""
    if version.tags.get(GATE) == "passed":
        return ""
    return str(version.tags.get(BREACHED) or "no verdict of it is recorded")


def _plain(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def account() -> str:
    """user@host of whoever runs this."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container a user may have a number only
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


_ABOUT = {
    "promote": (
        promote,
        "Make a version the champion: its files are read again and compared with the digest of their registration, the "
        "alias `champion` moves to it, `candidate` is taken from it, and the audit trail says who, when, why and what "
        "it replaced.",
        'python -m tasks promote 4 --reason "better on every axis, read 50 samples" --expect-champion 3',
    ),
    "reject": (
        reject,
        "Record that a version is not to be champion, and take the alias `candidate` from it if it bears it. The "
        "champion cannot be rejected: see rollback.",
        'python -m tasks reject 4 --reason "praises everything, see samples 3 and 17"',
    ),
    "rollback": (
        rollback,
        "Put a former champion back. VERSION is the present champion, which gives way to the one that it replaced; or "
        "a former champion, which is put back itself.",
        'python -m tasks rollback 4 --reason "users complain of repetition"',
    ),
}
"""Of each command what it does, its help, and an example."""


def arguments(parser: argparse.ArgumentParser) -> None:
    _, parser.description, example = _ABOUT[parser.get_default("name")]
    parser.epilog = f"example: {example}"
    parser.add_argument("version", type=int, metavar="VERSION", help="number of the version in the registry")
    model_argument(parser)
    parser.add_argument("--reason", required=True, help=f"why, for the audit trail; at most {REASON} characters")
    parser.add_argument("--by", help=f"who decides (default: {account()})")
    parser.add_argument(
        "--expect-champion",
        metavar=f"N|{NOBODY}",
        help="refuse (exit code 4) if the champion is no longer the version that you compared with",
    )
    parser.set_defaults(despite_gate=False)
    if parser.get_default("name") == "promote":
        parser.add_argument(
            "--despite-gate", action="store_true", help="promote a version that failed the gate; recorded as such"
        )


def command(args: argparse.Namespace, workspace: Workspace) -> int:
    name = model_name(args, workspace)
    statement = Statement.of(args.reason, args.by, args.expect_champion, args.despite_gate)
    decide, _, _ = _ABOUT[args.name]
    print(f"{name}: {decide(workspace, name, args.version, statement)}")
    return 0
