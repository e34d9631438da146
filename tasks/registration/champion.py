"""The approved model in service, as a third subject of the evaluation: only if its files are what was registered."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from safetensors import safe_open

from tasks.errors import IntegrityError
from tasks.registration import registry
from tasks.registration.registry import ModelVersion
from tasks.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Champion:
    """The version with the alias `champion`, and its policy; or why there is none that can be compared with."""

    model: str
    """Name of the registered model."""
    version: int | None = None
    folder: Path | None = None
    """None where it cannot be asked. `models/policy` where it is this very policy."""
    reason: str = "no version has the alias champion"
    is_policy: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """For metrics/evaluate.json: what was compared with, which tells later whether the champion has changed."""
        return {
            "champion_model": self.model,
            "champion_version": self.version,
            "champion_is_policy": self.is_policy,
        }


@contextmanager
def present(client: MlflowClient, name: str, workspace: Workspace) -> Iterator[Champion]:
    """The champion of the registered model `name`, its files there for the length of the block."""
    registered = registry.with_alias(client, name, registry.CHAMPION)
    if registered is None:
        yield Champion(name)
        return
    number = int(registered.version)
    if is_policy(registered, workspace):
        yield Champion(name, number, workspace.policy, "", is_policy=True)
        return
    with ExitStack() as held:
        try:
            folder = held.enter_context(registry.stored_checkpoint(client, registered))
            reason = _why_not(registered, folder, workspace)
        except IntegrityError as error:
            reason = str(error)
        if reason:
            log.warning("champion version %d is not compared with: %s", number, reason)
        yield Champion(name, number, None if reason else folder, reason)


def has_changed(client: MlflowClient, metrics: Mapping[str, Any], name: str, workspace: Workspace) -> bool:
    """Whether an evaluation with these `metrics` has not compared its policy with the champion of the model `name`.

    A champion that is the policy itself is nothing new to compare with, and none at all leaves what was compared true.
    """
    if metrics["champion_model"] != name:
        return True
    registered = registry.with_alias(client, name, registry.CHAMPION)
    if registered is None or int(registered.version) == metrics["champion_version"]:
        return False
    return not is_policy(registered, workspace)


def is_policy(registered: ModelVersion, workspace: Workspace) -> bool:
    """Whether a version holds what lies in models/policy."""
    return registered.tags.get(registry.POLICY) == registry.policy_digest(workspace.policy)


def _why_not(registered: ModelVersion, folder: Path, workspace: Workspace) -> str:
    """Why the champion's policy cannot answer beside ours; empty if it can."""
    recorded = registered.tags.get(registry.POLICY)
    if recorded is None:
        return f"it has no tag {registry.POLICY} to compare its files with: it was not registered by the register stage"
    if registry.policy_digest(folder) != recorded:
        return "its files are not those that were registered"
    if _shapes(folder) != _shapes(workspace.policy):
        return "its weights have other shapes: it is built on another base model"
    if _reading(folder) != _reading(workspace.policy):
        return "it reads text as other tokens: it is built on another base model"
    return ""


def _shapes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            found |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return found


def _reading(folder: Path) -> tuple[list[Any], str]:
    """How text becomes tokens: the tokenizer's model and the chat template."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    read_as = [tokenizer["model"], tokenizer.get("added_tokens")]
    return read_as, template.read_text(encoding="utf-8") if template.is_file() else ""
