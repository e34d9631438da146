"""Save, load, continue equals never having stopped, bit for bit; and each piece of the state is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_config, toy_model, toy_trainer

from ppo_core.checkpoint import load_plain, load_tensors, save_checkpoint, verify_checkpoint
from ppo_core.config import PPOConfig
from ppo_core.errors import TrainingHealthError
from ppo_core.trainer import Trainer

MODES = [(trainable, critic) for trainable in ("top_layers", "lora", "full") for critic in ("shared", "separate")]
BEFORE, AFTER = 2, 2


def everything_on(trainable: str, critic: str, dtype: str = "float32") -> PPOConfig:
    """Every part that remembers something from one iteration to the next."""
    return toy_config(
        rollout_size=4,
        model={"trainable": trainable, "critic": critic, "dtype": dtype},
        sampling={"top_p": 0.9, "temperature": 0.8},
        reward={"kl_target": 0.1, "kl_horizon": 20, "normalise": True, "missing_eos_penalty": 0.1},
        loss={"ptx_coef": 0.3, "ptx_batch": 3, "entropy_coef": 0.01},
        update={
            "schedule": "cosine",
            "critic_schedule": "linear",
            "schedule_iterations": 20,
            "warmup_iterations": 3,
            "epochs": 1,
            "minibatches": 2,
        },
        # Every iteration is sick, the last one once too often.
        health={"min_entropy": 100.0, "patience": BEFORE + AFTER},
    )


def trainer(config: PPOConfig) -> Trainer:
    # 5 prompts for rollouts of 4: an iteration ends in the middle of an epoch.
    prompts = [[3], [4, 5], [6, 7, 8], [9, 10], [11]]
    model = toy_model(dtype=getattr(torch, config.model.dtype))
    return toy_trainer(config, model=model, prompts=prompts, ptx=[[3, 4, 5], [6, 7], [8, 9, 10, 11]])


@dataclass
class Outcome:
    """All that some iterations left."""

    figures: list[Any]
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    working: list[Tensor]

    def differs(self, other: Outcome) -> bool:
        if (self.figures, self.plain) != (other.figures, other.plain) or self.tensors.keys() != other.tensors.keys():
            return True
        pairs = [*((t, other.tensors[name]) for name, t in self.tensors.items())]
        pairs += zip(self.working, other.working, strict=True)
        return not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def go_on(t: Trainer, iterations: int) -> Outcome:
    figures: list[Any] = []
    try:
        for _ in range(iterations):
            figures.append({name: value for name, value in t.step().items() if not name.endswith("_s")})
    except TrainingHealthError as error:
        figures.append(str(error))
    tensors, plain = t.state()
    working = [p.detach().clone() for p in t.optimiser.weights.working]
    return Outcome(figures, {k: v.clone() for k, v in tensors.items()}, plain, working)


def through_files(t: Trainer, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, plain = t.state()
    save_checkpoint(folder, {"trainer.safetensors": tensors}, {"trainer.json": plain})
    verify_checkpoint(folder)
    return load_tensors(folder / "trainer.safetensors"), load_plain(folder / "trainer.json")


@pytest.mark.parametrize(("trainable", "critic", "dtype"), [
    *((trainable, critic, "float32") for trainable, critic in MODES),
    ("top_layers", "shared", "bfloat16"), ("full", "separate", "bfloat16"),
])  # fmt: skip
def test_save_load_continue_equals_never_having_stopped(tmp_path: Path, trainable: str, critic: str, dtype: str):
    config = everything_on(trainable, critic, dtype)
    through = trainer(config)
    first = go_on(through, BEFORE)
    whole = go_on(through, AFTER)
    stopped = trainer(config)
    assert not go_on(stopped, BEFORE).differs(first)
    resumed = trainer(config)
    resumed.load_state(*through_files(stopped, tmp_path / "checkpoint"))
    again = go_on(resumed, AFTER)
    assert not whole.differs(again)
    # The iterations did something, and the last one ended as its health says.
    assert isinstance(whole.figures[-1], str)
    assert len(whole.figures) == AFTER
    assert whole.differs(first)
    # Without any of it, it is another run.
    assert whole.differs(go_on(trainer(config), AFTER))


@dataclass
class Stopped:
    """The state of a run after some iterations, as read from its checkpoint, and what came after."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    next_one: Outcome
    all_after: Outcome


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    t = trainer(everything_on("top_layers", "separate"))
    go_on(t, BEFORE)
    tensors, plain = through_files(t, tmp_path_factory.mktemp("run") / "checkpoint")
    next_one = go_on(t, 1)
    rest = go_on(t, AFTER - 1)
    return Stopped(tensors, plain, next_one, Outcome(next_one.figures + rest.figures, *list(vars(rest).values())[1:]))


TENSORS = ("master", "exp_avg", "exp_avg_sq", "step")
PLAIN = [("iteration",), ("kl", "coef"), ("moments", "count"), ("moments", "mean"), ("moments", "squares"), ("health",)]


def test_these_are_all_the_pieces(stopped: Stopped):
    tensors, plain = stopped.tensors, stopped.plain
    kinds = {key.split(".")[0] if key.startswith("master") else key.split(".")[-1] for key in tensors}
    assert kinds == set(TENSORS)
    paths = {(name, key) if name in ("kl", "moments") else (name,)
             for name, value in plain.items() for key in (value if isinstance(value, dict) else [None])}  # fmt: skip
    assert paths == set(PLAIN)
    weights = len(trainer(everything_on("top_layers", "separate")).optimiser.weights.masters)
    assert len(tensors) == 4 * weights
    assert plain["health"]


def test_nothing_left_out_is_no_difference(stopped: Stopped):
    tensors, plain = stopped.tensors, stopped.plain
    t = trainer(everything_on("top_layers", "separate"))
    t.load_state(tensors, plain)
    assert not stopped.all_after.differs(go_on(t, AFTER))


@pytest.mark.fault("resume: one part of the state forgotten", expected="another training, for every part there is")
@pytest.mark.parametrize("kind", TENSORS)
def test_each_tensor_is_needed(stopped: Stopped, kind: str):
    tensors, plain = stopped.tensors, stopped.plain
    names = [key for key in tensors if kind in (key.split(".")[0], key.split(".")[-1])]
    unneeded = []
    t = trainer(everything_on("top_layers", "separate"))
    fresh = {key: value.clone() for key, value in t.state()[0].items()}  # an optimiser that made no step has no slots
    for name in names:
        left_out = {name: fresh.get(name, torch.zeros_like(tensors[name]))}
        t.load_state({key: value.clone() for key, value in tensors.items()} | left_out, plain)
        if not stopped.next_one.differs(go_on(t, 1)):
            unneeded.append(name)
    assert names
    assert unneeded == []


@pytest.mark.fault("resume: one part of the state forgotten", expected="another training, for every part there is")
@pytest.mark.parametrize("path", PLAIN, ids=".".join)
def test_each_plain_value_is_needed(stopped: Stopped, path: tuple[str, ...]):
    tensors, plain = stopped.tensors, stopped.plain
    t = trainer(everything_on("top_layers", "separate"))
    _, fresh = t.state()
    name, *key = path
    left_out = fresh[name] if not key else plain[name] | {key[0]: fresh[name][key[0]]}
    t.load_state({k: v.clone() for k, v in tensors.items()}, plain | {name: left_out})
    again = go_on(t, AFTER)
    assert stopped.all_after.differs(again)
    # Streaks of health weigh on no weight: they decide when it ends. All else shows in the figures, too.
    assert stopped.all_after.figures != again.figures
