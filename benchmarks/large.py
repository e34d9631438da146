"""What a GPU is for: decoding at batch 128 against `generate` with a static cache, and an update of a larger model.

python -m benchmarks.large                   # random weights, 1.4 billion, in bfloat16: needs some 40 GB on a GPU
python -m benchmarks.large --shape tiny      # the same code anywhere, in seconds; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import limits
from benchmarks.memory import peak_bytes
from ppo_core.config import PPOConfig
from ppo_core.decoder import Stack, frozen
from ppo_core.device import clock, device, named
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.rollout import LengthReward
from ppo_core.sampling import Sampler, sample
from ppo_core.trainer import Trainer
from ppo_core.types import Rollout, pad_prompts

SHAPES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "vocab_size": 49_152, "batch": 128, "prompt": 256, "response": 128, "micro_batch": 64},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 256, "batch": 4, "prompt": 8, "response": 4, "micro_batch": 2},
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations a second of dense bfloat16 products, by NVIDIA's data sheets (the SXM models)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="large")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(SHAPES[args.shape], args.pairs)))


def measure(shape: dict[str, int], pairs: int) -> dict[str, Any]:
    """Decoding first, then the update, each with the other's memory free."""
    torch.manual_seed(0)
    return {
        "machine": named(device()),
        "shape": shape,
        "decode": _decoding(shape, pairs),
        "update": _updating(shape, pairs),
        "peak_bytes": peak_bytes(),
    }


def _model(shape: dict[str, int]) -> Any:
    known = {name: value for name, value in shape.items() if name in LlamaConfig().to_dict()}
    config = LlamaConfig(**known, max_position_embeddings=2048, tie_word_embeddings=True, dtype=torch.bfloat16)
    return frozen(LlamaForCausalLM(config).to(torch.bfloat16))


def _prompts(shape: dict[str, int]) -> list[list[int]]:
    """Random tokens; a quarter to the whole of the longest prompt."""
    draw, longest = random.Random(17), shape["prompt"]
    lengths = [draw.randint(longest // 4, longest) for _ in range(shape["batch"])]
    return [[draw.randrange(3, shape["vocab_size"]) for _ in range(length)] for length in lengths]


def _decoding(shape: dict[str, int], pairs: int) -> dict[str, Any]:
    """Every answer as long as allowed: tokens a second here and there, in turns; there as it is, and compiled."""
    model, prompts, length = _model(shape), _prompts(shape), shape["response"]
    sampler, law = Sampler(None, Stack(model.get_decoder())), SamplingLaw(_config(shape).sampling, [2])
    tokens, attention = pad_prompts(prompts, 2, device())

    def ours() -> None:
        sample(sampler, model.lm_head, prompts, law, range(len(prompts)), 2)

    def theirs(compiled: bool) -> None:
        model.generate(
            input_ids=tokens, attention_mask=attention.long(), do_sample=True, top_k=0, pad_token_id=2,
            min_new_tokens=length, max_new_tokens=length, eos_token_id=2, cache_implementation="static",
            disable_compile=not compiled,
        )  # fmt: skip

    ways = {"proximal": ours, "generate": partial(theirs, False), "generate_compiled": partial(theirs, True)}
    first = {name: _seconds(way) for name, way in ways.items()}
    _seconds(ways["generate_compiled"])  # whose graphs are recorded at the second call
    taken = [{name: _seconds(way) for name, way in ways.items()} for _ in range(pairs)]
    n = len(prompts) * length
    return {
        "first_seconds": first,
        "tokens_per_second": {name: [n / seconds[name] for seconds in taken] for name in ways},
        "times_faster_than": {
            name: statistics.median(seconds[name] / seconds["proximal"] for seconds in taken) for name in list(ways)[1:]
        },
    }


def _updating(shape: dict[str, int], times: int) -> dict[str, Any]:
    """All weights of a policy with a shared critic: the share of the GPU's peak that an update's products make up."""
    config, model = _config(shape), _model(shape)
    law, reward = SamplingLaw(config.sampling, [2]), LengthReward(shape["response"], 0.0, 1.0)
    trainer = Trainer(ActorCritic(model, config.model), reward, _prompts(shape), config, seed=3, law=law, pad=2)
    rollout = trainer.roll_out()
    experience = trainer.estimate(rollout)

    def update() -> None:
        trainer.optimiser.update(experience, seed=3, iteration=0, kl_coef=0.05)

    _seconds(update)
    seconds = statistics.median(_seconds(update) for _ in range(times))
    rate = _operations(model.config, rollout, config.update.epochs) / seconds
    peak = next((peak for name, peak in PEAKS.items() if name in named(device())), None)
    return {
        "seconds": seconds,
        "tokens_per_second": float(rollout.sequences.attention.sum()) * config.update.epochs / seconds,
        "operations_per_second": rate,
        "model_flops_utilisation": None if peak is None else rate / peak,
    }


def _operations(config: Any, rollout: Rollout, epochs: int) -> float:
    """Of the model itself: two for each weight and token that counts, and twice that backwards.

    Padding and attention's own products are left out, which makes the share smaller than it is.
    """
    tokens, counted = int(rollout.sequences.attention.sum()), int(rollout.mask.sum())
    products = limits.products(config, tokens, counted, config.num_hidden_layers, head=True, head_trained=True)
    return epochs * sum(2.0 * m * k * n for m, k, n in products)


def _config(shape: dict[str, int]) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "rollout_size": shape["batch"],
            "iterations": 1,
            "model": {"trainable": "full", "critic": "shared", "dtype": "bfloat16"},
            "sampling": {"max_new_tokens": shape["response"], "min_new_tokens": shape["response"]},
            "update": {"epochs": 1, "minibatches": 1, "micro_batch": shape["micro_batch"], "learning_rate": 1e-6},
        }
    )


def _seconds(do: Callable[[], object]) -> float:
    start = clock()
    do()
    return clock() - start


if __name__ == "__main__":
    main()
