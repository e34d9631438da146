"""`python -m benchmarks.overhead`: the default run, and how much of its time is not the work itself.

In a fresh clone, where DVC skips nothing. What Prefect and DVC add is the time of the whole command less that of its
stages, the loading of PPO's models and its cycles, which the log tells to the second. Validation and registration
count whole; opening and closing the run in MLflow, as three stages do, is timed once more when all is done. Of a cycle
it is all but training and the dev prompts: checkpoint and record.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("ingest", "validate", "reward_model", "evaluate", "register")
"""Beside ppo, of which the log tells the beginning and the cycles."""
CYCLE = r"\bcycle \d+: judge .* \((\d+) s\)$"
LOADING = r"by the reference \((\d+) s\)$"
WITH_A_RUN = 3
"""Stages that open the run in MLflow."""


def main() -> None:
    started = time.monotonic()
    log = _run([sys.executable, "-m", "flows.align"])
    everything = time.monotonic() - started
    seconds = {stage: _stage_seconds(log, stage) for stage in STAGES}
    cycles = [int(whole) for whole in re.findall(CYCLE, log, flags=re.MULTILINE)]
    (loading,) = re.findall(LOADING, log, flags=re.MULTILINE)
    hand_over = everything - sum(seconds.values()) - int(loading) - sum(cycles)
    mlflow = WITH_A_RUN * _open_and_close_seconds()
    found = {
        "seconds": {"all": everything, "loading": int(loading), "cycles": cycles, **seconds},
        "prefect_and_dvc_s": hand_over,
        "mlflow_open_and_close_s": mlflow,
        "validate_s": seconds["validate"],
        "register_s": seconds["register"],
        "in_all_s": hand_over + mlflow + seconds["validate"] + seconds["register"],
        "share_of_a_cycle": 1 - sum(_work_seconds(n) for n in range(1, len(cycles) + 1)) / sum(cycles),
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


def _work_seconds(cycle: int) -> float:
    """Of training and the dev prompts."""
    record = ROOT / "work" / "ppo" / _fingerprint() / f"cycle_{cycle:03d}" / "record.json"
    times = json.loads(record.read_text(encoding="utf-8"))
    return float(times["time/train_s"] + times["time/dev_s"])


def _fingerprint() -> str:
    found: str = json.loads((ROOT / "metrics" / "ppo.json").read_text(encoding="utf-8"))["fingerprint"]
    return found


def _open_and_close_seconds() -> float:
    from tasks.params import load_params
    from tasks.tracking import Tracker
    from tasks.workspace import Workspace

    workspace = Workspace(ROOT)
    started = time.monotonic()
    with Tracker.open(workspace, _fingerprint(), load_params(workspace.params)):
        pass
    return time.monotonic() - started


if __name__ == "__main__":
    main()
