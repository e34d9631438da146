"""Tokens a second of sampling, here and by transformers' `generate`; and what a token costs in larger batches.

python -m benchmarks.rollouts
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import environment

environment.prepare()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks import limits  # noqa: E402
from benchmarks.work import RESPONSE, WORKS  # noqa: E402
from ppo_core.config import SamplingConfig  # noqa: E402
from ppo_core.decoder import LMHead, Stack, load_causal_lm  # noqa: E402
from ppo_core.device import clock, device  # noqa: E402
from ppo_core.law import SamplingLaw  # noqa: E402
from ppo_core.precision import arithmetic  # noqa: E402
from ppo_core.sampling import Sampler, sample  # noqa: E402
from ppo_core.types import pad_prompts  # noqa: E402

WORK = WORKS["ragged"]
BATCHES = (16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    args = parser.parse_args()
    dtype = arithmetic(args.dtype)
    model = load_causal_lm(args.model, dtype)
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True).eval().to(device())
    ours, theirs = _ours(model), _generate(plain)
    ours(32), theirs(32)
    pairs = [(ours(32), theirs(32)) for _ in range(args.pairs)]
    # The weights of layers and output layer are read once for every token of the batch.
    step_bytes = sum(p.nbytes for p in model.parameters())
    print(
        json.dumps(
            {
                "dtype": str(model.dtype).removeprefix("torch."),
                "proximal_tokens_per_second": [pair[0] for pair in pairs],
                "generate_tokens_per_second": [pair[1] for pair in pairs],
                "ratio": statistics.median(one / other for one, other in pairs),
                "memory_limit_tokens_per_second": 32 * limits.read_bandwidth() / step_bytes,
                "growth": {size: 1 / statistics.median(ours(size) for _ in range(3)) for size in BATCHES},
            }
        )
    )


def _ours(model: Any) -> Callable[[int], float]:
    sampler = Sampler(None, Stack(model.get_decoder()))
    law = SamplingLaw(SamplingConfig(max_new_tokens=RESPONSE), WORK.stop_tokens())

    def run(size: int) -> float:
        start = clock()
        samples = sample(sampler, LMHead(model), WORK.prompts(size), law, range(size), 2)
        return float(samples.sequences.mask.sum()) / (clock() - start)

    return run


def _generate(model: Any) -> Callable[[int], float]:
    stops = WORK.stop_tokens()

    def run(size: int) -> float:
        start = clock()
        tokens, attention = pad_prompts(WORK.prompts(size), 2, device())
        out = model.generate(
            input_ids=tokens, attention_mask=attention.long(), do_sample=True, top_k=0, max_new_tokens=RESPONSE,
            eos_token_id=stops, pad_token_id=2,
        )  # fmt: skip
        taken = clock() - start
        ended = torch.isin(out[:, tokens.shape[1] :], torch.tensor(stops, device=out.device)).int()
        return float(((ended.cumsum(dim=1) - ended) == 0).sum()) / taken

    return run


if __name__ == "__main__":
    main()
