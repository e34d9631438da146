"""Workspaces into which good and bad files are read; a plugin of fixtures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from tasks.__main__ import main
from tasks.data.sources import digest
from tasks.workspace import Workspace

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
FINE = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
RATED = [{"text": f"film number {i} was good", "ratings": [i % 5, 1]} for i in range(60)]

Seen = Callable[[str], None]


def jsonl(*lines: Any) -> bytes:
    """Forty good rows, then these: JSON values, or bytes as they are."""
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in (*FINE, *lines))


def csv(*lines: bytes) -> bytes:
    fine = b"".join(f"question {i},good {i},bad {i}\n".encode() for i in range(40))
    return b"prompt,chosen,rejected\n" + fine + b"".join(lines)


def parquet(**columns: Any) -> bytes:
    table = pa.table({key: [row[key] for row in FINE] for key in FINE[0]} | columns)
    pq.write_table(table, sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, judge_folder: Path) -> Workspace:
    """A workspace after a good ingest; its outputs are never to change."""
    workspace = Workspace(tmp_path_factory.mktemp("faults") / "checkout")
    workspace.own_data.mkdir(parents=True)
    shutil.copytree(policy_folder, workspace.own_data / "policy")
    shutil.copytree(judge_folder, workspace.own_data / "judge")
    assert ingest(workspace, "good.jsonl", jsonl()) == 0
    return workspace


@pytest.fixture
def used(made: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it, to break."""
    shutil.copytree(made.root, tmp_path / "used")
    return Workspace(tmp_path / "used")


def ingest(workspace: Workspace, name: str, content: bytes | None, *settings: str, **data: Any) -> int:
    """Put a file into the user's folder and run the stage on it."""
    if content is not None:
        (workspace.own_data / name).write_bytes(content)
    raw = tiny.tiny_params()
    raw["ingest"]["data"] = [{"source": f"file:{name}", "format": "preferences", **data}]
    raw["ingest"]["splits"] |= {"dev": 2, "test": 3}
    workspace.params.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return run(workspace, "ingest", *settings)


def run(workspace: Workspace, stage: str, *settings: str) -> int:
    sets = [part for setting in settings for part in ("--set", setting)]
    return main([stage, "--workspace", str(workspace.root), *sets])


def outputs(workspace: Workspace) -> dict[Path, str]:
    return {path: digest(path) for path in (workspace.canonical, workspace.base_model, workspace.judge_base)}
