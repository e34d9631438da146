"""What a training keeps on disk, in `work/ppo/<fingerprint>/` of the main checkout.

`cycle_NNN` holds the trained weights of policy and critic, the trainer's counters and the cycle's record; all are
kept. `state_NNN` holds what training goes on from (masters, optimiser, counters); the last `ppo.keep_states` are kept.
A cycle is finished when its folder is there; what was finished is never written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ppo_core.checkpoint import load_plain, load_tensors, needs_room, save_checkpoint, size_of, sweep, verify_checkpoint
from tasks.errors import IntegrityError, ResumeMismatch
from tasks.fingerprint import environment
from tasks.workspace_lock import exclusive

Record = dict[str, Any]
"""One finished cycle: `cycle`, `dev/...` on the dev prompts, `train/...` mean diagnostics, `time/...` seconds."""
State = tuple[dict[str, Tensor], dict[str, Any]]
"""Of a trainer: tensors, and plain values for JSON."""
Weights = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Trained weights of policy and critic."""

WEIGHTS, CRITIC, COUNTERS = "policy.safetensors", "critic.safetensors", "counters.json"
GO_ON = "PROXIMAL_ACCEPT_ENVIRONMENT"


class RunFolder:
    """The cycles of one training. Worktrees share it: whoever writes holds it (`held`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes here during the block. Raises Locked where another process does.

        Raises ResumeMismatch where libraries or machine are not those of the run's beginning, unless told to go on.
        """
        with exclusive(self.path / "lock", f"the training {self.path.name}"):
            sweep(self.path)
            self._check_environment()
            yield

    def weights(self, cycle: int) -> Path:
        """The policy's trained weights after `cycle`."""
        return self._cycle(cycle) / WEIGHTS

    def critic(self, cycle: int) -> tuple[Path, Path]:
        """The critic's trained weights after `cycle`, and the trainer's counters, the KL coefficient among them."""
        return self._cycle(cycle) / CRITIC, self._cycle(cycle) / COUNTERS

    def verify(self, cycle: int) -> None:
        """Raise IntegrityError unless `cycle` was finished and its files are those that were written."""
        verify_checkpoint(self._cycle(cycle))

    def finished(self) -> list[Record]:
        """Records of the finished cycles, their files verified."""
        records: list[Record] = []
        while (folder := self._cycle(len(records) + 1)).is_dir():
            verify_checkpoint(folder)
            records.append(load_plain(folder / "record.json"))
        if beyond := [f.name for f in sorted(self.path.glob("cycle_*")) if f.name > folder.name]:
            raise IntegrityError(
                f"{folder.name} is missing, but {', '.join(beyond)} are there",
                str(self.path),
                f"delete those too to continue from cycle {len(records)}, or move the folder away to start anew",
            )
        return records

    def state(self, cycle: int) -> State:
        """What training goes on from after `cycle`."""
        state = self._state(cycle)
        try:
            verify_checkpoint(state)
        except IntegrityError as error:
            both = f"{state.name} and {self._cycle(cycle).name}"
            mend = f"delete {both} to repeat that cycle, or move the folder away to start anew"
            raise IntegrityError(str(error), str(self.path), mend) from error
        return load_tensors(state / "tensors.safetensors"), load_plain(state / "plain.json")

    def check_room(self, state: State, weights: Weights) -> None:
        """Raise ResourceError where the next cycle could not be saved: better before its training than after."""
        tensors = state[0]
        # Before its first step the optimiser has no moments yet: two for every master will come.
        to_come = 0 if any(name.startswith("adam.") for name in tensors) else 2
        with needs_room(self.path, size_of(*[tensors] * (1 + to_come), *weights)):
            pass

    def save(self, record: Record, state: State, weights: Weights, keep_states: int) -> None:
        """Finish a cycle: its state, then what makes it count. Only then do older states go."""
        cycle, (tensors, plain) = record["cycle"], state
        place = self._state(cycle)
        shutil.rmtree(place, ignore_errors=True)  # a process killed between the two writes left it without its cycle
        save_checkpoint(place, {"tensors.safetensors": tensors}, {"plain.json": plain})
        policy, critic = weights
        save_checkpoint(self._cycle(cycle), {WEIGHTS: policy, CRITIC: critic}, {"record.json": record, COUNTERS: plain})
        self.tidy(cycle, keep_states)

    def tidy(self, cycle: int, keep_states: int) -> None:
        """Remove states that are too old after `cycle` to be kept."""
        for old in range(1, cycle - keep_states + 1):
            shutil.rmtree(self._state(old), ignore_errors=True)

    def _cycle(self, cycle: int) -> Path:
        return self.path / f"cycle_{cycle:03d}"

    def _state(self, cycle: int) -> Path:
        return self.path / f"state_{cycle:03d}"

    def _check_environment(self) -> None:
        """A continuation elsewhere would be another run: refuse it, unless told to go on."""
        path, now = self.path / "environment.json", environment()
        if not self._cycle(1).is_dir() or os.environ.get(GO_ON) == "1":
            beside = path.with_suffix(".writing")
            beside.write_text(json.dumps(now, indent=2), encoding="utf-8")
            beside.replace(path)
        then = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]:
            changes = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in differing)
            raise ResumeMismatch(
                f"the run was begun elsewhere: {changes}",
                str(self.path),
                f"set {GO_ON}=1 to go on anyway, or move the folder away to start anew",
            )
