"""Profiles: parameters that differ from params.yaml, for other data and models (docs/profiles.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError
from tasks.params import Params, check_params, dump_params, load_params
from tasks.workspace import Workspace


def profile_under(params: Params, name: str, workspace: Workspace) -> Params:
    """The profile's parameters, and over them those of `params` that differ from params.yaml."""
    in_profile = load_params(workspace.params, profile=profile_file(name, workspace))
    before = load_params(workspace.params)
    return check_params(_changed(dump_params(in_profile), dump_params(before), dump_params(params)))


def profile_file(name: str, workspace: Workspace) -> Path:
    """The file of a profile. Raises ConfigError that lists those there are."""
    files = {path.stem: path for path in sorted(workspace.profiles.glob("*.yaml"))}
    if name not in files:
        known = f"choose one of {', '.join(files)}" if files else "there is none"
        raise ConfigError(f"there is no profile {name!r}", str(workspace.profiles), known)
    return files[name]


def _changed(values: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every change that leads from `before` to `now`; a key that is gone there goes here, too."""
    result = {key: value for key, value in values.items() if key in now or key not in before}
    for key, value in now.items():
        if key in before and value == before[key]:
            continue
        mappings = all(isinstance(side.get(key), Mapping) for side in (values, before, now))
        result[key] = _changed(values[key], before[key], value) if mappings and "source" not in value else value
    return result
