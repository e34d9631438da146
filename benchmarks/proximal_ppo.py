"""One contestant: iterations of `ppo_core` on the work of `work.py`. Prints one JSON object.

python -m benchmarks.proximal_ppo --kind full --work equal
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tasks import environment

environment.prepare()

import torch  # noqa: E402

from benchmarks import limits  # noqa: E402
from benchmarks.memory import peak_bytes  # noqa: E402
from benchmarks.work import BATCH, EPOCHS, MICRO_BATCH, RESPONSE, WORKS, Work  # noqa: E402
from ppo_core.config import PPOConfig  # noqa: E402
from ppo_core.decoder import clone, load_causal_lm, split  # noqa: E402
from ppo_core.law import SamplingLaw  # noqa: E402
from ppo_core.models import ActorCritic  # noqa: E402
from ppo_core.precision import arithmetic  # noqa: E402
from ppo_core.rollout import ModelReward  # noqa: E402
from ppo_core.scorers import RewardModel  # noqa: E402
from ppo_core.trainer import Trainer  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "full": {"trainable": "full", "critic": "separate", "critic_start": "policy"},
    "top_layers": {"trainable": "top_layers", "top_layers": 6, "critic": "shared"},
}
"""`full` is TRL's own algorithm: four models, all weights of policy and critic trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="full")
    parser.add_argument("--work", choices=WORKS, default="equal")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    args = parser.parse_args()
    torch.manual_seed(0)
    trainer = new_trainer(args.kind, WORKS[args.work], args.dtype, args.model)
    steps = [trainer.step() for _ in range(args.iterations)]
    keys = ("sample_s", "score_s", "update_s", "tokens", "length")
    dtype = trainer.model.reference_head.linear.weight.dtype
    found = {
        "iterations": [{key: step[key] for key in keys} for step in steps],
        "peak_bytes": peak_bytes(),
        "dtype": str(dtype).removeprefix("torch."),
        "products_s": _products_seconds(trainer, args.kind, WORKS[args.work], dtype),
    }
    print(json.dumps(found))


def new_trainer(kind: str, work: Work, dtype: str, folder: Path) -> Trainer:
    config = PPOConfig.model_validate(
        {
            "rollout_size": BATCH,
            "iterations": 1,
            "model": KINDS[kind] | {"dtype": dtype},
            "sampling": {"max_new_tokens": RESPONSE, "min_new_tokens": 0 if work.ending else RESPONSE},
            "update": {"epochs": EPOCHS, "minibatches": 1, "micro_batch": MICRO_BATCH, "learning_rate": 1e-6},
            "health": {"patience": 1000},
        }
    )
    base = load_causal_lm(folder, arithmetic(dtype))
    model = ActorCritic(base, config.model)
    # TRL's reward model is a whole model of its own; over a shared trunk ours is only a top.
    below = load_causal_lm(folder, arithmetic(dtype)) if kind == "full" else base
    trunk, top = split(below, 6)
    reward = RewardModel(trunk, clone(top), base.config.hidden_size, 2)
    torch.nn.init.normal_(reward.head.linear.weight, std=0.02)
    law = SamplingLaw(config.sampling, work.stop_tokens())
    return Trainer(model, ModelReward(reward, model), work.prompts(BATCH), config, seed=3, law=law, pad=2)


def _products_seconds(trainer: Trainer, kind: str, work: Work, dtype: torch.dtype) -> float | None:
    """What the products of an update alone would take; only where every micro-batch has the same shape."""
    if work.ending is not None:
        return None
    config, full = trainer.model.reference_model.config, kind == "full"
    tokens, counted = MICRO_BATCH * (work.longest + RESPONSE), MICRO_BATCH * RESPONSE
    layers = config.num_hidden_layers if full else trainer.config.model.top_layers
    wanted = limits.products(config, tokens, counted, layers, head=True, head_trained=full)
    if full:  # the critic
        wanted += limits.products(config, tokens, counted, layers, head=False, head_trained=False)
    return EPOCHS * (BATCH // MICRO_BATCH) * limits.seconds_of(wanted, dtype)


if __name__ == "__main__":
    main()
