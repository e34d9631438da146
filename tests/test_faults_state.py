"""A trainer that goes on from its state is the trainer that never stopped; one that forgets any part of it is not.

The parts are found in the state itself, so that a new one is tested from the day it is there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_core.config import PPOConfig
from ppo_core.decoder import load_causal_lm
from ppo_core.errors import TrainingHealthError
from ppo_core.models import ActorCritic
from ppo_core.trainer import Trainer
from ppo_core.types import Samples

EOS = PAD = 2
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61], [1, 70, 71, 72, 73, 74], [1, 80]]
BEFORE, AFTER = 2, 2
"""Iterations before and after the state was written."""

State = tuple[dict[str, Tensor], dict[str, Any]]


def low_ids(samples: Samples, activations: Tensor) -> Tensor:
    sequences = samples.sequences
    return -(sequences.responses * sequences.mask).sum(dim=1) / 1000.0


def same_for_all(samples: Samples, activations: Tensor) -> Tensor:
    return low_ids(samples, activations) * 0


def new(folder: Path) -> Trainer:
    settings = PPOConfig.model_validate(
        {
            "rollout_size": 8,
            "model": {"top_layers": 2, "dtype": "bfloat16", "critic": "separate"},
            "sampling": {"max_new_tokens": 6},
            "reward": {"kl_target": 1.0, "kl_horizon": 50},
            "update": {"epochs": 1, "minibatches": 2, "micro_batch": 4, "learning_rate": 1e-3},
        }
    )
    torch.manual_seed(0)
    model = ActorCritic(load_causal_lm(folder, torch.bfloat16), settings.model)
    return Trainer(model, low_ids, PROMPTS, settings, seed=3, eos=EOS, pad=PAD)


def go_on(trainer: Trainer, iterations: int, ailing: bool) -> list[Any]:
    """What is seen from outside: figures of every iteration, how it ended, the weights that answer.

    One that is `ailing` scores every response alike from the last iteration before the state was written: warned of
    then, and the end when it happens again, if the trainer remembers.
    """
    told: list[Any] = []
    try:
        for _ in range(iterations):
            trainer.reward = same_for_all if ailing and trainer.iteration >= BEFORE - 1 else low_ids
            told.append({k: v.hex() for k, v in trainer.step().items() if not k.endswith("_s")})
    except TrainingHealthError as error:
        told.append(str(error))
    return [*told, {name: p.detach().tolist() for name, p in trainer.model.policy_weights().items()}]


def through_files(state: State, folder: Path) -> State:
    """As a checkpoint keeps it."""
    save_file({k: t.clone() for k, t in state[0].items()}, folder / "tensors.safetensors")
    return load_file(folder / "tensors.safetensors"), json.loads(json.dumps(state[1]))


def parts(state: State) -> list[tuple[str, ...]]:
    """Each kind of tensor (`adam.*.exp_avg`), and each plain value by its path."""
    kinds = {tuple("*" if piece.isdigit() else piece for piece in name.split(".")) for name in state[0]}
    return [*sorted(kinds), *leaves(state[1])]


def leaves(plain: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def without(state: State, part: tuple[str, ...], fresh: State) -> State:
    """The state with one part as it is in a trainer that has done nothing (a slot that Adam makes later: zeros)."""
    tensors, plain = dict(state[0]), copy.deepcopy(state[1])
    for name in tensors:
        if part == tuple("*" if piece.isdigit() else piece for piece in name.split(".")):
            tensors[name] = fresh[0].get(name, torch.zeros_like(tensors[name]))
    if part in list(leaves(plain)):
        inner, before = plain, fresh[1]
        for key in part[:-1]:
            inner, before = inner[key], before[key]
        inner[part[-1]] = before[part[-1]]
    return tensors, plain


@dataclass(frozen=True)
class Course:
    """A training that was not interrupted: its state at the start and half-way, and what followed."""

    ailing: bool
    fresh: State
    half_way: State
    followed: list[Any]


@pytest.fixture(scope="module")
def courses(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Course]:
    found = []
    for ailing in (False, True):
        trainer = new(policy_folder)
        fresh = copy.deepcopy(trainer.state())
        go_on(trainer, BEFORE, ailing)
        half_way = through_files(trainer.state(), tmp_path_factory.mktemp("state"))
        found.append(Course(ailing, fresh, half_way, go_on(trainer, AFTER, ailing)))
    return found


def continued(folder: Path, state: State, ailing: bool) -> list[Any]:
    """What follows in a trainer that has only the state."""
    trainer = new(folder)
    trainer.load_state(*state)
    return go_on(trainer, AFTER, ailing)


def test_from_its_state_a_trainer_goes_on_as_if_it_had_not_stopped(policy_folder: Path, courses: list[Course]) -> None:
    for course in courses:
        assert continued(policy_folder, course.half_way, course.ailing) == course.followed
    assert any("constant reward" in told for told in courses[1].followed if isinstance(told, str))


@pytest.mark.fault("resume: one part of the state forgotten", expected="another training, for every part there is")
def test_whatever_part_of_the_state_is_forgotten_is_missed(
    policy_folder: Path, courses: list[Course], seen: Callable[[str], None]
) -> None:
    every_part = parts(courses[0].half_way)
    unmissed = [
        ".".join(part)
        for part in every_part
        if all(
            continued(policy_folder, without(course.half_way, part, course.fresh), course.ailing) == course.followed
            for course in courses
        )
    ]
    assert unmissed == []
    assert len(every_part) >= 7
    seen(f"{len(every_part)} of {len(every_part)} missed: {', '.join('.'.join(part) for part in every_part)}")
