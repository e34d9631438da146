"""`python -m benchmarks.overhead`: the default run, and how much of its time is not the work itself.

In a fresh clone, where DVC skips nothing. What Prefect and DVC add is the time of the whole command less that of its
stages, which the log tells to the second; validation and registration count whole; opening and closing the run in
MLflow, as three stages do, is timed once more when all is done. Of a cycle it is all but training and the dev prompts:
checkpoint and record.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("ingest", "validate", "reward_model", "ppo", "evaluate", "register")
WITH_A_RUN = ("ppo", "evaluate", "register")
"""Stages that open the run in MLflow."""


def main() -> None:
    started = time.monotonic()
    log = _run([sys.executable, "-m", "flows.align"])
    seconds = {"all": time.monotonic() - started} | {stage: _stage_seconds(log, stage) for stage in STAGES}
    hand_over = seconds["all"] - sum(seconds[stage] for stage in STAGES)
    mlflow = len(WITH_A_RUN) * _open_and_close_seconds()
    of_cycles = _shares_of_cycles(log)
    found = {
        "seconds": seconds,
        "prefect_and_dvc_s": hand_over,
        "mlflow_open_and_close_s": mlflow,
        "validate_s": seconds["validate"],
        "register_s": seconds["register"],
        "in_all_s": hand_over + mlflow + seconds["validate"] + seconds["register"],
        "share_of_a_cycle": sum(of_cycles) / len(of_cycles),
    }
    print(json.dumps(found, indent=1))


def _run(command: list[str]) -> str:
    """What it logs, also shown as it comes."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        lines.append(line)
    if process.wait():
        raise SystemExit(process.returncode)
    return "".join(lines)


def _stage_seconds(log: str, stage: str) -> int:
    found = re.search(rf"\b{stage}: .* \((\d+) s\)$", log, flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"{stage} did not run: DVC found it up to date. Measure in a fresh clone")
    return int(found[1])


def _shares_of_cycles(log: str) -> list[float]:
    """Of each cycle's time, the share that is neither training nor the dev prompts."""
    fingerprint = json.loads((ROOT / "metrics" / "ppo.json").read_text(encoding="utf-8"))["fingerprint"]
    shares = []
    for cycle, whole in re.findall(r"\bcycle (\d+): judge .* \((\d+) s\)$", log, flags=re.MULTILINE):
        path = ROOT / "work" / "ppo" / fingerprint / f"cycle_{int(cycle):03d}" / "record.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        shares.append(1 - (record["time/train_s"] + record["time/dev_s"]) / int(whole))
    return shares


def _open_and_close_seconds() -> float:
    from tasks.params import load_params
    from tasks.tracking import Tracker
    from tasks.workspace import Workspace

    workspace = Workspace(ROOT)
    fingerprint = json.loads((ROOT / "metrics" / "ppo.json").read_text(encoding="utf-8"))["fingerprint"]
    started = time.monotonic()
    with Tracker.open(workspace, fingerprint, load_params(workspace.params)):
        pass
    return time.monotonic() - started


if __name__ == "__main__":
    main()
