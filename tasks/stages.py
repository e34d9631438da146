"""The stages by name, and the one way to run one."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tasks.errors import DataError, ResourceError
from tasks.params import Params
from tasks.seals import check_inputs
from tasks.workspace import Workspace

STAGES = ("ingest", "validate", "reward_model", "ppo", "evaluate", "register")

_LESS_MEMORY = "lower ppo.update.micro_batch, ppo.rollout_size or reward_model.*.batch_pairs"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a stage has to say: `metrics` become `metrics/STAGE.json`, `summary` is one line for a person."""

    metrics: dict[str, Any]
    summary: str


def run_stage(stage: str, params: Params, workspace: Workspace) -> StageResult:
    """Run a stage's `run(params, workspace)` on inputs that are what was written, and write its metrics."""
    started = time.monotonic()
    check_inputs(stage, workspace)
    with machine_errors(stage, workspace):
        # Imported here: each stage brings heavy libraries that the others do not need.
        result: StageResult = importlib.import_module(f"tasks.{stage}").run(params, workspace)
    write_metrics(stage, result, workspace)
    log.info("%s: %s (%.0f s)", stage, result.summary, time.monotonic() - started)
    return result


@contextmanager
def machine_errors(stage: str, workspace: Workspace) -> Iterator[None]:
    """What a stage lacks (files, memory, disk) becomes an error that says what to do: DataError or ResourceError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            "is missing", str(error.filename), f"run the stages before {stage}: `dvc repro {stage}`"
        ) from error
    except MemoryError as error:
        raise ResourceError(f"memory is not enough: {error}", stage, _LESS_MEMORY) from error
    except RuntimeError as error:  # how torch says it
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise ResourceError(f"memory is not enough: {error}", stage, _LESS_MEMORY) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(workspace.root).free
            raise ResourceError(
                f"the disk is full ({free} bytes are free)", str(error.filename), "make room"
            ) from error
        raise


def write_metrics(stage: str, result: StageResult, workspace: Workspace) -> None:
    path = workspace.metrics(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
