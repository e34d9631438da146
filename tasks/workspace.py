"""Where everything lies. Each path is written once, here; `dvc.yaml` repeats the tracked ones and a test compares."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SMALL_RESULTS = ("dvc.lock", "metrics", "plots")
"""What DVC leaves to git."""


@dataclass(frozen=True)
class Workspace:
    """A checkout of the project (or a worktree of it) in which one run at a time takes place."""

    root: Path

    @classmethod
    def here(cls) -> Workspace:
        """The checkout that this code belongs to, whatever the working directory."""
        return cls(Path(__file__).resolve().parents[1])

    # inputs
    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def profiles(self) -> Path:
        """Parameters that differ from params.yaml, a file each."""
        return self.root / "profiles"

    @property
    def own_data(self) -> Path:
        """Files of the user's own; `file:` sources may not leave it."""
        return self.root / "data" / "own"

    # ingest
    @property
    def canonical(self) -> Path:
        return self.root / "data" / "canonical"

    @property
    def pairs(self) -> Path:
        return self.canonical / "pairs.parquet"

    @property
    def prompts(self) -> Path:
        return self.canonical / "prompts.parquet"

    @property
    def provenance(self) -> Path:
        return self.canonical / "provenance.json"

    @property
    def probes(self) -> Path:
        """Data of the evaluation's probes, NAME.parquet for each of `ingest.probes`; nothing trains on it."""
        return self.root / "data" / "probes"

    @property
    def base_model(self) -> Path:
        return self.root / "models" / "base"

    @property
    def judge_base(self) -> Path:
        return self.root / "models" / "judge_base"

    @property
    def reward_base(self) -> Path:
        """A ready-made reward model, or an empty one: its `source.json` says which."""
        return self.root / "models" / "reward_base"

    # reward_model
    @property
    def reward_model(self) -> Path:
        return self.root / "models" / "reward"

    @property
    def judge(self) -> Path:
        return self.root / "models" / "judge"

    # ppo
    @property
    def policy(self) -> Path:
        return self.root / "models" / "policy"

    @property
    def critic(self) -> Path:
        """The value function that was trained beside that policy, for the inspector."""
        return self.root / "models" / "critic"

    @property
    def cycles_csv(self) -> Path:
        """One row a cycle, for `dvc plots`."""
        return self.root / "plots" / "cycles.csv"

    # evaluate
    @property
    def samples(self) -> Path:
        """Responses to the test prompts before and after, with their scores."""
        return self.root / "reports" / "samples.parquet"

    # every stage
    def metrics(self, stage: str) -> Path:
        return self.root / "metrics" / f"{stage}.json"

    def report(self, stage: str) -> Path:
        """Folder of what a person reads of a stage: `report.html`, `report.md`, pictures."""
        return self.root / "reports" / stage

    # state that DVC does not track
    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def downloads(self) -> Path:
        """Fetched distributions, verified by SHA-256 and shared by every worktree."""
        return self.main_root / "work" / "downloads"

    @property
    def runs(self) -> Path:
        """Training state by fingerprint, shared by every worktree: other cycles or targets continue a run there too."""
        return self.main_root / "work" / "ppo"

    @property
    def lock_file(self) -> Path:
        return self.work / "lock"

    @property
    def registry_lock(self) -> Path:
        """Held while MLflow's registry, which worktrees share, is looked at and then changed."""
        return self.main_root / "work" / "registry.lock"

    @cached_property
    def main_root(self) -> Path:
        """The main checkout: a worktree shares its downloads and its MLflow store."""
        git = subprocess.run(
            ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        common = Path(git.stdout.strip())
        return common.parent if git.returncode == 0 and common.name == ".git" else self.root


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`. It takes the place of `folder` at the end, unless an error ends the block."""
    beside = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
