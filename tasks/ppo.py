"""Stage 4: PPO in cycles, each checkpointed (tasks/run_folder.py) and recorded before the next begins."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pandas as pd
from safetensors.torch import load_file
from tqdm import tqdm

from ppo_core.checkpoint import needs_room, size_of
from ppo_core.diagnostics import over_cycle
from ppo_core.models import ActorCritic
from ppo_core.trainer import Trainer
from ppo_core.weights import install
from tasks.errors import TrainingHealthError
from tasks.fingerprint import fingerprint
from tasks.models.critic import write_critic
from tasks.models.preference_models import load_base, load_tokenizer
from tasks.models.responses import Examiner
from tasks.models.rewards import described, load_trained, new_reward, only
from tasks.models.training_texts import preferred_texts, training_prompts
from tasks.models.vllm_sampler import VllmSampler
from tasks.params import Params
from tasks.run_folder import Record, RunFolder, Weights
from tasks.seals import seal
from tasks.stages import StageResult
from tasks.statistics import compare
from tasks.tracking import Tracker
from tasks.workspace import Workspace, replacing

log = logging.getLogger(__name__)


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
    """One alignment run. A context manager: it holds the run's folder, and the MLflow run open."""

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self.params, self.workspace = params, workspace
        self.fingerprint = fingerprint(params, workspace)
        self.folder = RunFolder(workspace.runs / self.fingerprint)
        self._trainer: Trainer | None = None
        with ExitStack() as opening:
            opening.enter_context(self.folder.held())
            self.records: list[Record] = self.folder.finished()
            self.tracker = opening.enter_context(Tracker.open(workspace, self.fingerprint, params))
            # A killed process may have finished a cycle and not told MLflow; recording twice changes nothing.
            for record in self.records:
                self.tracker.log_cycle(record, self.folder.weights(record["cycle"]))
            self._open = opening.pop_all()
        self.folder.tidy(len(self.records), params.ppo.keep_states)
        if self.records:
            log.info("continuing %s after cycle %d", self.fingerprint, len(self.records))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.__exit__(kind, error, tb)

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
        self.folder.check_room(trainer.state(), _weights(trainer))
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
        self.folder.save(record, trainer.state(), _weights(trainer), self.params.ppo.keep_states)
        self.records.append(record)
        self.tracker.log_cycle(record, self.folder.weights(cycle))
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
        self._write_policy(self.folder.weights(result["cycle"]))
        write_critic(self.workspace, self.folder, result["cycle"])
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
            started, params, workspace = time.perf_counter(), self.params, self.workspace
            base, tokenizer = load_base(workspace, params.ppo.model.dtype), load_tokenizer(workspace.base_model)
            context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
            prompts, ptx = (f(params, workspace, tokenizer, context) for f in (training_prompts, preferred_texts))
            trained = load_trained(params, workspace, base)
            model = ActorCritic(base, params.ppo.model, only(trained), seed=params.seed)
            reward = new_reward(params, workspace, tokenizer, model, trained)
            self.examiner = Examiner(params, workspace, reward, tokenizer)
            vllm = self._vllm_sampler(model, tokenizer.pad_token_id)
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
            trainer.answer = vllm or trainer.answer
            if self.records:
                trainer.load_state(*self.folder.state(len(self.records)))
            self._trainer = trainer
            log.info("models loaded, dev prompts answered by the reference (%.0f s)", time.perf_counter() - started)
        return self._trainer

    def _vllm_sampler(self, model: ActorCritic, pad: int) -> VllmSampler | None:
        if self.params.ppo.sampler == "own":
            return None
        return VllmSampler(model, self.examiner.law, self.folder.path / "vllm", pad)

    def _write_policy(self, weights: Path) -> None:
        """Base model and trained weights as one transformers folder, in the dtype that sampled."""
        # Only to be written, not to compute: whatever the device, files are made from the CPU.
        model = load_base(self.workspace, self.params.ppo.model.dtype).cpu()
        install(model, load_file(weights))
        with replacing(self.workspace.policy) as beside:
            with needs_room(beside, size_of(model.state_dict())):
                model.save_pretrained(beside)
            load_tokenizer(self.workspace.base_model).save_pretrained(beside)
            seal(beside)

    def _write_curves(self, records: list[Record]) -> None:
        rows = pd.DataFrame(records)
        columns = ["cycle", *(name for name in map(str, rows) if name.startswith("dev/"))]
        self.workspace.cycles_csv.parent.mkdir(parents=True, exist_ok=True)
        rows[columns].rename(columns=lambda name: name.removeprefix("dev/")).to_csv(
            self.workspace.cycles_csv, index=False
        )


def _weights(trainer: Trainer) -> Weights:
    return trainer.model.trained_weights(), trainer.model.critic_state()


def _refuse_non_finite(record: Record) -> None:
    if broken := [name for name, value in record.items() if not math.isfinite(value)]:
        raise TrainingHealthError(
            f"not finite: {', '.join(broken)}", f"cycle {record['cycle']}", "lower ppo.update.learning_rate"
        )
