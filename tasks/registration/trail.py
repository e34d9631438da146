"""The audit trail of a registered model: who decided what on a version, when, why, and what it replaced.

Each decision is a tag of its own on the registered model, so that it outlives the version, is seen in MLflow's UI, and
is never written over: its key ends in a random part, which keeps two writers apart even on different machines.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter, ValidationError

from tasks.errors import IntegrityError
from tasks.registration import registry

PREFIX = "decision."
LIMIT = 5000
"""Characters that MLflow's databases hold in a tag of a registered model."""
OUTSIDE = "outside of this tool"

Kind = Literal["promoted", "rejected", "rolled back", "set by hand", "taken away by hand"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """One entry of the trail."""

    kind: Kind
    version: int
    """Decided on."""
    champion: int | None
    """After it; None for no champion."""
    replaced: int | None
    """The champion before it."""
    by: str
    at: str
    """UTC, ISO 8601."""
    reason: str
    breached: str = ""
    """Rules of the gate in spite of which it was promoted."""

    def __str__(self) -> str:
        return f"{self.at} {self.by}: {self.words()}. {self.reason}".rstrip()

    def words(self) -> str:
        before = f"version {self.replaced}" if self.replaced else "no champion"
        spite = f" although it failed the gate ({self.breached})" if self.breached else ""
        return {
            "promoted": f"version {self.version} promoted to champion after {before}{spite}",
            "rejected": f"version {self.version} rejected",
            "rolled back": f"version {self.version} put back as champion after {before}",
            "set by hand": f"champion is version {self.version}, set by hand {OUTSIDE}, after {before}",
            "taken away by hand": f"there is no champion: taken away by hand {OUTSIDE} from version {self.version}",
        }[self.kind]


_READER = TypeAdapter(Decision)


def read(client: MlflowClient, name: str) -> list[Decision]:
    """All decisions on versions of the registered model, oldest first; none where there is no such model.

    Raises IntegrityError naming an entry that someone has changed so that it cannot be read.
    """
    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    return [_parsed(name, key, tags[key]) for key in sorted(tags) if key.startswith(PREFIX)]


def append(client: MlflowClient, name: str, decision: Decision) -> None:
    """Add the decision as the last one."""
    tags = client.get_registered_model(name).tags
    last = max((key for key in tags if key.startswith(PREFIX)), default=f"{PREFIX}0")
    number = int(last.removeprefix(PREFIX).partition(".")[0]) + 1
    value = json.dumps(asdict(decision), ensure_ascii=False)
    client.set_registered_model_tag(name, f"{PREFIX}{number:05}.{secrets.token_hex(4)}", value)


def by_hand(client: MlflowClient, name: str, decisions: Sequence[Decision]) -> Decision | None:
    """What was done with the alias `champion` since the last decision without an entry in the trail, if anything."""
    bearer = registry.with_alias(client, name, registry.CHAMPION)
    now, before = int(bearer.version) if bearer else None, decisions[-1].champion if decisions else None
    if now == before:
        return None
    kind: Kind = "set by hand" if now else "taken away by hand"
    return Decision(kind, now or before or 0, now, before, "unknown", utc_now(), "Noticed then; nobody said why.")


def caught_up(client: MlflowClient, name: str) -> list[Decision]:
    """The trail, with what was done by hand recorded in it. For whoever is about to write, in turn."""
    decisions = read(client, name)
    if found := by_hand(client, name, decisions):
        log.warning("%s: %s", name, found.words())
        append(client, name, found)
        decisions.append(found)
    return decisions


def about(version: int, decisions: Sequence[Decision]) -> list[Decision]:
    """Those that decided on this version, or that took its place."""
    return [d for d in decisions if version == d.version or version == d.replaced != d.champion]


def chosen(version: int, decisions: Sequence[Decision]) -> Decision | None:
    """The last decision for this version as champion; that it was put back is none."""
    made = [d for d in decisions if d.champion == version != d.replaced and d.kind != "rolled back"]
    return made[-1] if made else None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _parsed(name: str, key: str, value: str) -> Decision:
    try:
        return _READER.validate_json(value)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, found['loc']))} {found['msg']}".strip() for found in error.errors())
        mend = "put back its value in MLflow, or delete that tag"
        raise IntegrityError(f"is no longer a decision: {why}", f"{name}, tag {key}", mend) from error
