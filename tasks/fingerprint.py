"""Which run this is: a digest of everything that decides its course."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ppo_core.device import device, named
from ppo_core.digests import sha256
from ppo_core.precision import arithmetic
from tasks.models.own_function import source_file
from tasks.params import Params, dump_params
from tasks.workspace import Workspace

NOT_THE_COURSE = ("cycles", "target", "kl_budget", "keep_states")
"""Parameters of the ppo section that decide where a run ends and what it keeps, not where it goes: changing them
continues it."""
CODE = (
    "ppo_core",
    "tasks/ppo.py",
    "tasks/statistics.py",
    *(
        f"tasks/models/{n}.py"
        for n in ("own_function", "preference_models", "responses", "rewards", "training_texts", "vllm_sampler")
    ),
)
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def fingerprint(params: Params, workspace: Workspace) -> str:
    """16 hex digits over parameters, inputs and code of the ppo stage."""
    plain, functions = dump_params(params), params.ppo.reward.functions()
    ppo = {key: value for key, value in plain["ppo"].items() if key not in NOT_THE_COURSE}
    inputs = [
        workspace.prompts,
        workspace.pairs,
        *sorted(workspace.base_model.rglob("*")),
        *sorted(workspace.reward_base.rglob("*")),
        *sorted(workspace.reward_model.rglob("*")),
        *sorted(workspace.judge_base.rglob("*")),
        *sorted(workspace.judge.rglob("*")),
    ]
    facts = {
        "seed": params.seed,
        "ppo": ppo,
        "inputs": {str(path.relative_to(workspace.root)): sha256(path) for path in inputs if path.is_file()},
        "functions": {key: sha256(source_file(f, workspace.own_data, key)) for key, f in functions.items()},
        "code": {name: sha256(path) for name, path in _code_files().items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """What must be the same for a continuation to equal the uninterrupted run."""
    return {
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "device": named(device()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "automatic dtype": str(arithmetic("auto")),
        "threads": torch.get_num_threads(),
    }


def _code_files() -> dict[str, Path]:
    """The code that runs, which is the checkout's own (a worktree is made from it)."""
    root = Path(__file__).resolve().parents[1]
    files = [file for name in CODE for file in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))]
    return {str(file.relative_to(root)): file for file in sorted(files)}
