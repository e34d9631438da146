"""The algorithm is light to import: what is heavy is imported where it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CORE = Path(__file__).resolve().parents[1] / "ppo_core"
HEAVY = {"transformers", "peft", "pandas", "datasets", "mlflow", "prefect", "dvc", "great_expectations"}


def test_the_core_imports_nothing_heavy():
    modules = [f"ppo_core.{path.stem}" for path in CORE.glob("*.py")]
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CORE.parent, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert set(modules) <= loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_the_benchmarks_import_no_orchestration():
    names = ("large", "limits", "memory", "proximal_ppo", "rollouts", "work")
    code = f"import json, sys, {', '.join(f'benchmarks.{name}' for name in names)}; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CORE.parent, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"prefect", "mlflow", "dvc", "great_expectations"}


def test_the_parameters_import_no_torch():
    code = "import sys, ppo_core.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CORE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
