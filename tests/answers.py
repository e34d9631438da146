"""Made-up answers of a reference and of a better policy, and what the stages before evaluate leave: no model runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tiny

from tasks.models.responses import Responses
from tasks.params import Params, check_params
from tasks.probes.base import TEST, Continuation, Missing
from tasks.workspace import Workspace

FINGERPRINT = "f" * 16


def reference_answers(n: int = 40, seed: int = 0) -> Responses:
    """`n` answers that score around 0."""
    draw = np.random.default_rng(seed)
    return Responses(
        prompts=[" ".join(text.split()[:3]) for text, _ in tiny.sentences(n, seed)],
        texts=[text for text, _ in tiny.sentences(n, seed + 1)],
        reward=draw.normal(0, 1, n),
        judge=draw.normal(0, 1, n),
        kl=np.zeros(n),
        entropy=draw.normal(3.5, 0.2, n),
        ref_nll=draw.normal(3.6, 0.2, n),
        lengths=draw.integers(12, 24, n),
        ended=draw.random(n) < 0.3,
    )


def better_answers(reference: Responses, reward: float = 1.6, judge: float = 0.9, seed: int = 2) -> Responses:
    """Other answers to the same prompts, whose scores are higher by about `reward` and `judge`."""
    n, draw = len(reference.prompts), np.random.default_rng(seed)
    return replace(
        reference,
        texts=[text for text, _ in tiny.sentences(n, seed)],
        reward=reference.reward + draw.normal(reward, 0.8, n),
        judge=reference.judge + draw.normal(judge, 0.8, n),
        kl=draw.normal(9.0, 3.0, n),
        entropy=reference.entropy - 0.5,
        ref_nll=reference.ref_nll - 0.2,
    )


def cycles(n: int = 4) -> pd.DataFrame:
    """A table as the ppo stage leaves it in plots/cycles.csv."""
    cycle = np.arange(1, n + 1)
    return pd.DataFrame(
        {
            "cycle": cycle,
            "judge_win_rate": 0.5 + 0.35 * (1 - np.exp(-cycle / 2.5)),
            "reward_gain": 1.9 * (1 - np.exp(-cycle / 3)),
            "judge_gain": 1.0 * (1 - np.exp(-cycle / 2.5)),
            "judge_gain_se": 0.05,
            "unconfirmed_se": 0.06,
            "judge_share": 0.6 - 0.01 * cycle,
            "kl": 1.7 * cycle,
            "entropy": 3.6 - 0.1 * cycle,
            "entropy_reference": 3.6,
            "length": 24.0 - 0.1 * cycle,
            "length_reference": 24.0,
            "distinct_2": 0.95 - 0.01 * cycle,
            "distinct_2_reference": 0.95,
            "repetition": 0.055 + 0.001 * cycle,
            "repetition_reference": 0.055,
            "repetition_3": 0.001,
            "repetition_3_reference": 0.001,
        }
    )


@dataclass
class Asked:
    """What a probe may use, made up: answers by subject, data by name, log-probabilities by a function."""

    answers: Mapping[str, Responses]
    workspace: Workspace
    params: Params
    cycles: pd.DataFrame = field(default_factory=cycles)
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    reading: Callable[[str, Continuation], np.ndarray] = lambda subject, text: np.full(len(text.text), -2.0)
    prompt_sets: tuple[str, ...] = (TEST,)

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self.answers)

    def responses(self, subject: str, prompts: str) -> Responses:
        return self.answers[subject]

    def logprobs(self, subject: str, texts: Sequence[Continuation]) -> list[np.ndarray]:
        return [self.reading(subject, text) for text in texts]

    def items(self, name: str) -> pd.DataFrame:
        if name not in self.data:
            raise Missing(f"ingest.probes names no data {name}")
        return self.data[name]


def trained_workspace(root: Path) -> tuple[Workspace, Params]:
    """A workspace in which the ppo stage seems to have just ended, and its parameters."""
    workspace = Workspace(root)
    ppo = {
        "mlflow_run_id": "run-1", "fingerprint": FINGERPRINT, "cycles": 4, "stopped_by": "cycles", "result_cycle": 4,
        "maximised": "the trained reward model",
    }  # fmt: skip
    origin = {
        "name": "ratings", "source": "file:ratings.jsonl", "version": "", "file": "", "sha256": "a" * 64,
        "licence": "MIT", "rows": 240, "format": "ratings",
    }  # fmt: skip
    for path, content in ((workspace.metrics("ppo"), ppo), (workspace.provenance, [origin])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    texts = [text for text, _ in tiny.sentences(200)]
    pd.DataFrame({"chosen": texts[:100], "rejected": texts[100:]}).to_parquet(workspace.pairs)
    workspace.cycles_csv.parent.mkdir()
    cycles().to_csv(workspace.cycles_csv, index=False)
    return workspace, check_params(tiny.tiny_params())
