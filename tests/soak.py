"""`make soak`: a tiny training is killed at random times until it has suffered enough, and must not show it.

Each round is a training of its own: SIGKILL after a random time, the same command again, and so on until it is left to
end. What it leaves is compared, bit for bit, with a training that was never disturbed. The times are drawn from a seed;
where they strike depends on the machine, so every soak is another one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks import environment

environment.prepare()

from courses import course, differences  # noqa: E402
from killing import Stages, stages  # noqa: E402
from trainings import before_ppo, copied  # noqa: E402

from tasks.workspace import Workspace  # noqa: E402

KILLS_A_ROUND = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rounds = killed = lost = wrong = 0
    with tempfile.TemporaryDirectory() as folder, stages() as server:
        ready = before_ppo(Path(folder) / "ready", cycles=4)
        place = copied(ready, Path(folder) / "undisturbed")
        began = time.monotonic()
        train(server, place)
        seconds = time.monotonic() - began
        expected = course(place)
        while killed < args.kills:
            rounds += 1
            place = copied(ready, Path(folder) / f"round {rounds}")
            strikes = min(KILLS_A_ROUND, args.kills - killed)
            hit, gone = disturb(server, place, draw, strikes, seconds)
            killed, lost = killed + hit, lost + gone
            seconds *= 1.0 if hit else 0.8  # the machine has become quicker: aim earlier
            train(server, place)
            unlike = differences(course(place), expected)
            wrong += bool(unlike)
            print(f"{killed} of {args.kills} kills: {unlike or 'equal'}", flush=True)
    print(f"killed {killed} times at random (seed {args.seed}): finished cycles lost {lost}, wrong resumes {wrong}")
    return 1 if lost or wrong else 0


def train(server: Stages, place: Workspace) -> None:
    """Let it end."""
    log = place.root / "log"
    status = server.run(["ppo", "--workspace", str(place.root)], log)
    if status:
        sys.exit(f"the training ended with {status}:\n{log.read_text()}")


def disturb(server: Stages, place: Workspace, draw: random.Random, strikes: int, seconds: float) -> tuple[int, int]:
    """Kill it up to so many times before its end. Returns how often, and the finished cycles that were lost."""
    lost = 0
    for hit in range(strikes):
        before = finished(place)
        command = ["ppo", "--workspace", str(place.root)]
        if server.run_for(draw.uniform(0, seconds), command, place.root / "log") != -signal.SIGKILL:
            return hit, lost
        lost += len(before - finished(place))
    return strikes, lost


def finished(place: Workspace) -> set[str]:
    """The cycles that count, by what they hold."""
    return {json.loads(path.read_text())["policy.safetensors"] for path in place.runs.glob("*/cycle_*/manifest.json")}


if __name__ == "__main__":
    sys.exit(main())
