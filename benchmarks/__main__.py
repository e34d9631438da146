"""`make bench`: Proximal and TRL on the same work, in turns; a table, results/cpu.json (or gpu.json) and a picture.

TRL gets an environment of its own in work/trl, made on first use (some minutes). Figures are medians over rounds;
ratios are medians of the ratios within rounds: what disturbs a round disturbs both sides of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TRL = ROOT / "work" / "trl"
RESULTS = HERE / "results"
CONTESTANTS = {
    "TRL": [str(TRL / "bin" / "python"), "benchmarks/trl_ppo.py"],
    "full": [sys.executable, "-m", "benchmarks.proximal_ppo", "--kind", "full"],
    "top_layers": [sys.executable, "-m", "benchmarks.proximal_ppo", "--kind", "top_layers"],
}
PHASES = {"sample_s": "rollout", "score_s": "scoring", "update_s": "update"}

Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--work", nargs="+", choices=("equal", "ragged"), default=["equal", "ragged"])
    args = parser.parse_args()
    _make_environment()
    turns = [(work, name) for work in args.work for _ in range(args.rounds) for name in CONTESTANTS]
    runs: dict[str, dict[str, list[Found]]] = {work: {name: [] for name in CONTESTANTS} for work in args.work}
    for work, name in tqdm(turns, desc="turns", unit="turn"):
        runs[work][name].append(_run([*CONTESTANTS[name], "--work", work]))
    rollouts, gpu = _run([sys.executable, "-m", "benchmarks.rollouts"]), torch.cuda.is_available()
    report = {
        "machine": _machine(),
        "iteration": {work: _compare(found) for work, found in runs.items()},
        "rollouts": rollouts,
        **({"large": _run([sys.executable, "-m", "benchmarks.large"])} if gpu else {}),
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "gpu" if gpu else "cpu"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _picture(report).savefig(ROOT / "docs" / "images" / f"benchmark{'_gpu' if gpu else ''}.png", dpi=150)
    print(_table(report))


def _make_environment() -> None:
    if (TRL / "ready").exists():
        return
    print("making an environment for TRL in work/trl; this takes some minutes, and is not needed again", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(TRL)], check=True)
    wanted = ["--requirement", str(HERE / "requirements-trl.txt")]
    pip = [str(TRL / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True)
    (TRL / "ready").touch()


def _run(command: list[str]) -> Found:
    """The JSON object in the last line of what a contestant prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: Found = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _last(run: Found) -> dict[str, float]:
    """Figures of a run's last iteration, the machine warm: seconds by phase and in all."""
    last = run["iterations"][-1]
    return {name: last[key] for key, name in PHASES.items()} | {"iteration": sum(last[key] for key in PHASES)}


def _compare(found: dict[str, list[Found]]) -> dict[str, Found]:
    compared = {}
    for name, runs in found.items():
        seconds = [_last(run) for run in runs]
        theirs = [_last(run) for run in found["TRL"]]
        # Per response token: chance gives the contestants a few more or fewer of them.
        tokens = [run["iterations"][-1]["tokens"] for run in runs]
        per_token = [s["iteration"] / n for s, n in zip(seconds, tokens, strict=True)]
        of_trl = [t["iteration"] / r["iterations"][-1]["tokens"] for t, r in zip(theirs, found["TRL"], strict=True)]
        peak = statistics.median(run["peak_bytes"] for run in runs)
        compared[name] = {
            "seconds": {phase: statistics.median(s[phase] for s in seconds) for phase in seconds[0]},
            "tokens_per_second": {
                phase: statistics.median(n / s[phase] for s, n in zip(seconds, tokens, strict=True))
                for phase in seconds[0]
            },
            "times_faster": statistics.median(b / a for a, b in zip(per_token, of_trl, strict=True)),
            "peak_bytes": peak,
            "memory_of_trl": peak / statistics.median(run["peak_bytes"] for run in found["TRL"]),
        }
        shares = [
            run["products_s"] / s["update"] for run, s in zip(runs, seconds, strict=True) if run.get("products_s")
        ]
        if shares:
            compared[name]["update_share_of_products"] = statistics.median(shares)
    return compared


def _machine() -> dict[str, Any]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    native = [name for name, there in torch.cpu.get_capabilities().items() if there is True and "bf16" in name]
    return {
        "processor": model,
        "cores": torch.get_num_threads(),
        "bfloat16": native,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _read(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _table(report: Found) -> str:
    columns = ("rollout", "scoring", "update", "all (s)", "faster", "peak GB")
    lines = [f"{'work':8} {'contestant':11} " + " ".join(f"{column:>8}" for column in columns)]
    for work, compared in report["iteration"].items():
        for name, figures in compared.items():
            s = figures["seconds"]
            numbers = [s["rollout"], s["scoring"], s["update"], s["iteration"]]
            shown = " ".join(f"{number:8.1f}" for number in numbers)
            peak = figures["peak_bytes"] / 1e9
            lines.append(f"{work:8} {name:11} {shown} {figures['times_faster']:7.1f}x {peak:8.1f}")
    rollouts = report["rollouts"]
    ours, theirs = (statistics.median(rollouts[f"{who}_tokens_per_second"]) for who in ("proximal", "generate"))
    lines.append(
        f"rollouts alone, batch 32, ragged: {ours:.0f} tokens/s; generate {theirs:.0f}; {rollouts['ratio']:.1f}x"
    )
    return "\n".join(lines)


def _picture(report: Found) -> Figure:
    """Seconds of an iteration by phase, one bar a contestant."""
    works = report["iteration"]
    figure = Figure(figsize=(8, 1.6 + 1.3 * len(works)), layout="constrained")
    all_axes = figure.subplots(len(works), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (work, compared) in zip(all_axes, works.items(), strict=True):
        for i, (name, figures) in enumerate(compared.items()):
            left = 0.0
            for phase, colour in zip(PHASES.values(), ("#0072b2", "#e69f00", "#56b4e9"), strict=True):
                wide = figures["seconds"][phase]
                axes.barh(i, wide, left=left, color=colour, label=phase if i == 0 else None)
                left += wide
            note = f" {figures['seconds']['iteration']:.1f} s" + (
                "" if name == "TRL" else f", {figures['times_faster']:.1f} times as fast a token"
            )
            axes.text(left, i, note, va="center")
        axes.set_yticks(range(len(compared)), compared)
        axes.invert_yaxis()
        axes.set_title(f"{work} lengths", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.35)
    handles, phases = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, phases, frameon=False, ncols=3, loc="outside upper right")
    all_axes[-1].set_xlabel("seconds an iteration: 32 prompts, 32 tokens of response at most, 2 epochs")
    return figure


if __name__ == "__main__":
    main()
