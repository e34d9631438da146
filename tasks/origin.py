"""What a result was made from and by: sources, commit, versions, parameters."""

from __future__ import annotations

import json
import platform

import yaml

from tasks.fingerprint import environment
from tasks.params import Params, dump_params
from tasks.run_tags import flatten, git_commit
from tasks.workspace import Workspace


def sources(workspace: Workspace) -> tuple[list[str], list[list[object]]]:
    """Headers and rows of data/canonical/provenance.json, which has the digests whole."""
    columns = ["name", "source", "version", "licence", "rows"]
    entries = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    rows = [[*(entry.get(column) for column in columns), f"{entry['sha256'][:12]}…"] for entry in entries]
    return [*columns, "sha256"], rows


def parent(workspace: Workspace) -> str:
    """The model that the policy was made of, as the provenance names it."""
    entries = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    found = [entry for entry in entries if entry["name"] == "policy"]
    return ", ".join(f"{entry['source']} {entry['version']} {entry['file']}".strip() for entry in found) or "not stated"


def versions(workspace: Workspace) -> dict[str, str]:
    """What DVC calls the data and the models: with these names it brings them back."""
    lock = workspace.root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.is_file() else {}
    outputs = [out for stage in stages.values() for out in stage.get("outs", [])]
    kept = [out for out in outputs if out["path"].startswith(("data/", "models/")) and "md5" in out]
    return {f"dvc.{out['path']}": str(out["md5"]) for out in kept}


def made_by(workspace: Workspace) -> dict[str, str]:
    """The commit, `-dirty` where code or parameters differ from it, and the versions of what computes."""
    commit, changed = git_commit(workspace.root) or ("none", False)
    facts = {
        "git commit": f"{commit}-dirty" if changed else commit,
        "python": platform.python_version(),
        **environment(),
    }
    return {name: str(value) for name, value in facts.items()}


def parameters(params: Params) -> dict[str, str]:
    """Every parameter as `section.key`."""
    return {key: str(value) for key, value in flatten(dump_params(params))}
