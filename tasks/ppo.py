"""Stage 4: PPO in cycles, each checkpointed and recorded before the next begins.

State lies in `work/ppo/<fingerprint>/` of the main checkout: `cycle_NNN` (the policy's trained weights and the cycle's
record; all are kept) and `state_NNN` (masters, optimiser, counters; the last two are kept). A cycle is finished when
its folder is there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
from safetensors.torch import load_file
from tqdm import tqdm

from ppo_core.checkpoint import load_plain, load_tensors, save_checkpoint, verify_checkpoint
from ppo_core.diagnostics import over_cycle
from ppo_core.models import ActorCritic
from ppo_core.trainer import Trainer
from ppo_core.weights import install
from tasks.errors import IntegrityError, ResumeMismatch, TrainingHealthError
from tasks.fingerprint import environment, fingerprint
from tasks.params import Params
from tasks.preference_models import load_base, load_tokenizer
from tasks.responses import Examiner
from tasks.rewards import described, load_trained, new_reward
from tasks.stages import StageResult
from tasks.statistics import compare
from tasks.tracking import Tracker
from tasks.training_texts import preferred_texts, training_prompts
from tasks.workspace import Workspace

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""One finished cycle: `cycle`, `dev/...` on the dev prompts, `train/...` mean diagnostics, `time/...` seconds."""

WEIGHTS = "policy.safetensors"
GO_ON = "PROXIMAL_ACCEPT_ENVIRONMENT"


def run(params: Params, workspace: Workspace) -> StageResult:
    """All cycles, one after another."""
    with open_run(params, workspace) as ppo:
        while ppo.stopped is None:
            ppo.next_cycle()
        return ppo.finish()


def open_run(params: Params, workspace: Workspace) -> PPORun:
    """The run that `params` and the inputs describe: new, or where it was left."""
    return PPORun(params, workspace)


class PPORun:
    """One alignment run. A context manager: it holds the MLflow run open."""

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self.params, self.workspace = params, workspace
        self.fingerprint = fingerprint(params, workspace)
        self.folder = workspace.runs / self.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_environment()
        self.records: list[Record] = self._finished_cycles()
        self.tracker = Tracker.open(workspace, self.fingerprint, params)
        self._trainer: Trainer | None = None

    def __enter__(self) -> Self:
        # A killed process may have finished a cycle and not told MLflow; recording twice changes nothing.
        try:
            for record in self.records:
                self.tracker.log_cycle(record, self._cycle_folder(record["cycle"]) / WEIGHTS)
        except BaseException:
            self.tracker.close("FAILED")
            raise
        if self.records:
            log.info("continuing %s after cycle %d", self.fingerprint, len(self.records))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.tracker.__exit__(kind, error, tb)

    @property
    def stopped(self) -> str | None:
        """Why no further cycle follows: `target`, `kl_budget` or `cycles`; None while one does."""
        return self._course()[1]

    def _course(self) -> tuple[list[Record], str | None]:
        """The cycles up to the first reason to stop, and that reason.

        A folder may hold more cycles, from a run with other limits: the result is that of a run which had these.
        """
        for n in range(1, len(self.records) + 1):
            if reason := self._reason_to_stop(self.records[:n]):
                return self.records[:n], reason
        return self.records, None

    def _reason_to_stop(self, records: list[Record]) -> str | None:
        ppo = self.params.ppo
        if records[-1]["dev/kl"] > ppo.kl_budget:
            return "kl_budget"
        if (target := ppo.target) is not None:
            last = [r[f"dev/{target.metric}"] for r in records[-target.patience :]]
            if len(last) == target.patience and min(last) >= target.threshold:
                return "target"
        return "cycles" if len(records) == ppo.cycles else None

    def next_cycle(self) -> Record:
        """Train for one cycle, ask the dev prompts, checkpoint, record."""
        trainer, cycle = self._ready(), len(self.records) + 1
        started = time.perf_counter()
        steps = tqdm(range(self.params.ppo.iterations), desc=f"cycle {cycle}", unit="iteration", disable=None)
        stats = over_cycle([trainer.step() for _ in steps])
        trained = time.perf_counter()
        figures = compare(self.examiner.ask(trainer.model, "dev"), self.before)
        record: Record = {"cycle": cycle}
        record |= {f"dev/{name}": value for name, value in figures.items()}
        for name, value in stats.items():
            record[f"{'time' if name.endswith(('_s', '_per_second')) else 'train'}/{name}"] = value
        record |= {"time/train_s": trained - started, "time/dev_s": time.perf_counter() - trained}
        _refuse_non_finite(record)
        self._save(trainer, record)
        self.records.append(record)
        self.tracker.log_cycle(record, self._cycle_folder(cycle) / WEIGHTS)
        log.info(
            "cycle %d: judge win rate %.3f, reward %+.2f sd, judge %+.2f sd, KL %.1f nats (%.0f s)",
            cycle,
            *(record[f"dev/{name}"] for name in ("judge_win_rate", "reward_gain", "judge_gain", "kl")),
            time.perf_counter() - started,
        )
        return record

    def finish(self) -> StageResult:
        """Take the last cycle within the KL budget as the result."""
        records, stopped_by = self._course()
        within = [r for r in records if r["dev/kl"] <= self.params.ppo.kl_budget]
        if not within:
            raise TrainingHealthError(
                f"no cycle stayed within the KL budget of {self.params.ppo.kl_budget} nats",
                "ppo.kl_budget",
                "raise ppo.reward.kl_coef or lower ppo.update.learning_rate",
            )
        result = within[-1]
        self._write_policy(self._cycle_folder(result["cycle"]) / WEIGHTS)
        self._write_curves(records)
        figures = {name.removeprefix("dev/"): v for name, v in result.items() if name.startswith("dev/")}
        metrics = {
            "mlflow_run_id": self.tracker.run_id,
            "fingerprint": self.fingerprint,
            "maximised": described(self.params, self.workspace),
            "cycles": len(records),
            "stopped_by": stopped_by,
            "result_cycle": result["cycle"],
            **figures,
        }
        self.tracker.log_stage("ppo", {"result_cycle": result["cycle"], **figures}, None)
        return StageResult(
            metrics,
            f"{len(records)} cycles, stopped by {stopped_by}; cycle {result['cycle']} is the result: "
            f"judge win rate {figures['judge_win_rate']:.3f} at KL {figures['kl']:.1f} on dev prompts",
        )

    def _ready(self) -> Trainer:
        """The trainer, loaded when first needed and brought to the last finished cycle."""
        if self._trainer is None:
            params, workspace = self.params, self.workspace
            base, tokenizer = load_base(workspace, params.ppo.model.dtype), load_tokenizer(workspace.base_model)
            context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
            prompts, ptx = (f(params, workspace, tokenizer, context) for f in (training_prompts, preferred_texts))
            reward_model = load_trained(params, workspace, base)
            model = ActorCritic(base, params.ppo.model, reward_model, seed=params.seed)
            reward = new_reward(params, workspace, tokenizer, model, reward_model)
            self.examiner = Examiner(params, workspace, reward, tokenizer)
            # Asked before any state is loaded, the policy is the reference.
            self.before = self.examiner.ask(model, "dev")
            trainer = Trainer(
                model,
                reward,
                prompts,
                params.ppo,
                seed=params.seed,
                law=self.examiner.law,
                pad=tokenizer.pad_token_id,
                ptx=ptx,
            )
            if self.records:
                self._load_state(trainer)
            self._trainer = trainer
        return self._trainer

    def _load_state(self, trainer: Trainer) -> None:
        """Bring a new trainer to the last finished cycle."""
        state = self._state_folder(len(self.records))
        try:
            verify_checkpoint(state)
        except IntegrityError as error:
            cycle = self._cycle_folder(len(self.records)).name
            mend = f"delete {state.name} and {cycle} to repeat that cycle, or move the folder away to start anew"
            raise IntegrityError(str(error), str(self.folder), mend) from error
        trainer.load_state(load_tensors(state / "tensors.safetensors"), load_plain(state / "plain.json"))

    def _save(self, trainer: Trainer, record: Record) -> None:
        cycle = record["cycle"]
        tensors, plain = trainer.state()
        state = self._state_folder(cycle)
        shutil.rmtree(state, ignore_errors=True)  # a process killed between the two writes left it without its cycle
        save_checkpoint(state, {"tensors.safetensors": tensors}, {"plain.json": plain})
        weights = trainer.model.trained_weights()
        save_checkpoint(self._cycle_folder(cycle), {WEIGHTS: weights}, {"record.json": record})
        for old in range(1, cycle - 1):
            shutil.rmtree(self._state_folder(old), ignore_errors=True)

    def _finished_cycles(self) -> list[Record]:
        records: list[Record] = []
        while (folder := self._cycle_folder(len(records) + 1)).is_dir():
            verify_checkpoint(folder)
            records.append(load_plain(folder / "record.json"))
        if beyond := [f.name for f in sorted(self.folder.glob("cycle_*")) if f.name > folder.name]:
            raise IntegrityError(
                f"{folder.name} is missing, but {', '.join(beyond)} are there",
                str(self.folder),
                f"delete those too to continue from cycle {len(records)}, or move the folder away to start anew",
            )
        return records

    def _cycle_folder(self, cycle: int) -> Path:
        return self.folder / f"cycle_{cycle:03d}"

    def _state_folder(self, cycle: int) -> Path:
        return self.folder / f"state_{cycle:03d}"

    def _check_environment(self) -> None:
        """A continuation elsewhere would be another run: refuse it, unless told to go on."""
        path, now = self.folder / "environment.json", environment()
        if not self._cycle_folder(1).is_dir() or os.environ.get(GO_ON) == "1":
            path.write_text(json.dumps(now, indent=2), encoding="utf-8")
        then = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]:
            changes = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in differing)
            raise ResumeMismatch(
                f"the run was begun elsewhere: {changes}",
                str(self.folder),
                f"set {GO_ON}=1 to go on anyway, or move the folder away to start anew",
            )

    def _write_policy(self, weights: Path) -> None:
        """Base model and trained weights as one transformers folder, in the dtype that sampled."""
        model = load_base(self.workspace, self.params.ppo.model.dtype)
        install(model, load_file(weights))
        beside = self.workspace.policy.with_name("policy.writing")
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        load_tokenizer(self.workspace.base_model).save_pretrained(beside)
        shutil.rmtree(self.workspace.policy, ignore_errors=True)
        beside.rename(self.workspace.policy)

    def _write_curves(self, records: list[Record]) -> None:
        rows = pd.DataFrame(records)
        columns = ["cycle", *(name for name in map(str, rows) if name.startswith("dev/"))]
        self.workspace.cycles_csv.parent.mkdir(parents=True, exist_ok=True)
        rows[columns].rename(columns=lambda name: name.removeprefix("dev/")).to_csv(
            self.workspace.cycles_csv, index=False
        )


def _refuse_non_finite(record: Record) -> None:
    if broken := [name for name, value in record.items() if not math.isfinite(value)]:
        raise TrainingHealthError(
            f"not finite: {', '.join(broken)}", f"cycle {record['cycle']}", "lower ppo.update.learning_rate"
        )
