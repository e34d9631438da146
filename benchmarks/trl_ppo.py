"""The other contestant: iterations of TRL's PPOTrainer on the same work, in TRL's environment. Prints one JSON object.

Nothing of TRL is changed but what ends a response; where its phases end is read off the functions that it calls.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.memory import peak_bytes
from benchmarks.work import BATCH, EPOCHS, MICRO_BATCH, RESPONSE, WORKS, Work

PAD = 0
GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=WORKS, default="equal")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--model", type=Path, default=Path("models/base"))
    args = parser.parse_args()
    clock = Clock(WORKS[args.work])
    trainer = new_trainer(WORKS[args.work], args.model, args.iterations, clock)
    clock.watch(trainer)
    trainer.train()
    dtype = "bfloat16" if GPU else "float32"
    print(json.dumps({"iterations": clock.iterations, "peak_bytes": peak_bytes(), "dtype": dtype}))


class Clock(TrainerCallback):
    """Writes down when each phase of an iteration ends, and how many tokens its responses have."""

    def __init__(self, work: Work) -> None:
        self.stops = torch.tensor(work.stop_tokens())
        self.iterations: list[dict[str, float]] = []
        self.marks: dict[str, float] = {}
        self.tokens = 0

    def watch(self, trainer: Any) -> None:
        generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

        def generation(*args: Any) -> Any:
            self.marks, self.tokens = {"begin": _now()}, 0
            result = generate(*args)
            self.marks["sampled"] = _now()
            return result

        def accumulation(*args: Any) -> Any:
            self.marks.setdefault("scored", _now())
            return accumulate(*args)

        ppo_trainer.batch_generation = generation
        ppo_trainer.truncate_response = self.truncate
        trainer.accelerator.accumulate = accumulation

    def truncate(self, stop_token: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        """What TRL's own function of this name does, for any of several tokens."""
        ends = torch.isin(responses, self.stops.to(responses.device)).int()
        alive = (ends.cumsum(dim=1) - ends) == 0
        self.tokens += int(alive.sum())
        return torch.where(alive, responses, pad)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        begin, sampled, scored = (self.marks[name] for name in ("begin", "sampled", "scored"))
        self.iterations.append(
            {
                "sample_s": sampled - begin,
                "score_s": scored - sampled,
                "update_s": _now() - scored,
                "tokens": float(self.tokens),
                "length": self.tokens / BATCH,
            }
        )


def _now() -> float:
    """Once the GPU, if there is one, has done what it was asked."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def new_trainer(work: Work, folder: Path, iterations: int, clock: Clock) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token_id = PAD  # its own is EOS, which TRL would take for padding
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32) for _ in range(2)
    )
    config = PPOConfig(
        output_dir="work/trl-output",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=BATCH * iterations,
        response_length=RESPONSE,
        local_rollout_forward_batch_size=BATCH,
        stop_token_id=2,
        learning_rate=1e-6,
        num_sample_generations=0,
        missing_eos_penalty=None,
        use_cpu=not GPU,
        bf16=GPU,  # on a CPU it changes nothing
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    # The same prompts in each iteration, as for the other contestants.
    data = Dataset.from_dict({"input_ids": work.prompts(BATCH)})
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=data, eval_dataset=data, callbacks=[clock],
    )  # fmt: skip


if __name__ == "__main__":
    main()
