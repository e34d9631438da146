"""Profiles: parameters that differ from params.yaml, for other data and models (docs/profiles.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError
from tasks.params import Params, check_params, dump_params, load_params, merged
from tasks.workspace import Workspace


def profile_under(params: Params, name: str, workspace: Workspace) -> Params:
    """The profile's parameters, and over them those of `params` that differ from params.yaml."""
    in_profile = load_params(workspace.params, profile=profile_file(name, workspace))
    by_hand = _differing(dump_params(params), dump_params(load_params(workspace.params)))
    return check_params(merged(dump_params(in_profile), by_hand))


def profile_file(name: str, workspace: Workspace) -> Path:
    """The file of a profile. Raises ConfigError that lists those there are."""
    files = {path.stem: path for path in sorted(workspace.profiles.glob("*.yaml"))}
    if name not in files:
        known = f"choose one of {', '.join(files)}" if files else "there is none"
        raise ConfigError(f"there is no profile {name!r}", str(workspace.profiles), known)
    return files[name]


def _differing(values: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """What `values` say that `present` does not."""
    found = {}
    for key, value in values.items():
        before = present.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and "source" not in value:
            if below := _differing(value, before):
                found[key] = below
        elif key not in present or value != before:
            found[key] = value
    return found
