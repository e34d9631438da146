"""Rollouts by a vLLM server beside our own: tokens a second, and how far its log-probabilities lie from the policy's.

A server must run (docs/vllm.md): `python -m benchmarks.vllm`, with PROXIMAL_VLLM_URL where it is not on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tasks import environment

environment.prepare()

from benchmarks.proximal_ppo import KINDS, new_trainer  # noqa: E402
from benchmarks.work import WORKS  # noqa: E402
from ppo_core.trainer import Answer, Trainer  # noqa: E402
from tasks.models.vllm_sampler import VllmSampler  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="top_layers")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    args = parser.parse_args()
    trainer = new_trainer(args.kind, WORKS["ragged"], args.dtype, args.model)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"own": trainer.answer, "vllm": VllmSampler(trainer.model, trainer.law, Path(folder), trainer.pad)}
        for answer in ways.values():
            _step(trainer, answer)
        order = [*ways.items()]
        pairs = [{name: _step(trainer, answer) for name, answer in order[:: (-1) ** i]} for i in range(args.pairs)]
    print(
        json.dumps(
            {
                "tokens_per_second": {name: [pair[name][0] for pair in pairs] for name in ways},
                "ratio_of_own": statistics.median(pair["vllm"][0] / pair["own"][0] for pair in pairs),
                "sampler_gap": {name: statistics.median(pair[name][1] for pair in pairs) for name in ways},
            }
        )
    )


def _step(trainer: Trainer, answer: Answer) -> tuple[float, float]:
    """Tokens a second of an iteration's rollout, weights handed over included, and its gap."""
    trainer.answer = answer
    stats = trainer.step()
    return stats["tokens"] / stats["sample_s"], stats["sampler_gap"]


if __name__ == "__main__":
    main()
