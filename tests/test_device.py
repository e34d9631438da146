"""Where things are: all of it runs on a device that is not the CPU, and comes to the same figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import THERE, Elsewhere, elsewhere
from runs import EOS, MODES, PAD, PROMPTS, Figures, config, length_reward, same_figures, trainer
from stores import new_store
from tiny import tiny_judge, tiny_reward
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmarks import large
from ppo_core import device
from ppo_core.checkpoint import load_tensors, save_checkpoint
from ppo_core.config import PPOConfig
from ppo_core.decoder import clone, frozen, load_causal_lm, split
from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.precision import arithmetic
from ppo_core.preferences import Pairs, fit
from ppo_core.rollout import CombinedReward, FunctionReward, LengthReward, ModelReward, RewardFunction
from ppo_core.scorers import EncoderScorer, ReadyScorer, RewardModel, TextScorer, score_texts
from ppo_core.trainer import Trainer
from tasks.params import load_params
from tasks.stages import run_stage
from tasks.workspace import Workspace


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_training_comes_to_the_same_elsewhere(policy_folder: Path, trainable: str, critic: str) -> None:
    settings = config(trainable, critic)
    here = _steps(trainer(policy_folder, settings))
    with elsewhere():
        there = trainer(policy_folder, settings)
        assert there.model.device == THERE
        same_figures(here, _steps(there))


def test_what_is_seldom_asked_for_runs_elsewhere_too(policy_folder: Path) -> None:
    """Kept sets, a minimum length, stop strings, human texts in the loss, a reward made of all kinds of parts."""
    here = _steps(_unusual(policy_folder))
    with elsewhere():
        same_figures(here, _steps(_unusual(policy_folder)))


def test_a_training_is_saved_and_goes_on_elsewhere(policy_folder: Path, tmp_path: Path) -> None:
    settings = config("full", "separate")
    with elsewhere():
        first = trainer(policy_folder, settings)
        first.step()
        tensors, plain = first.state()
        save_checkpoint(tmp_path / "state", {"tensors.safetensors": tensors}, {"plain.json": plain})
        expected = first.step()
        second = trainer(policy_folder, settings)
        second.load_state(load_tensors(tmp_path / "state" / "tensors.safetensors"), copy.deepcopy(plain))
        moments = second.optimiser.adam.state_dict()["state"][0]
        assert all(isinstance(moment, Elsewhere) for moment in moments.values())
        same_figures([expected], [second.step()])


@pytest.mark.parametrize("kind", ["reward", "judge", "ready"])
def test_scorers_learn_and_score_elsewhere(policy_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = {"judge": tiny_judge, "ready": tiny_reward}[kind](tmp_path / kind) if kind != "reward" else policy_folder
    here = _scored(kind, folder)
    with elsewhere():
        there = _scored(kind, folder)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def test_the_stages_that_compute_run_elsewhere(workspace: Workspace) -> None:
    new_store(workspace)
    params = load_params(workspace.params)
    run_stage("ingest", params, workspace)
    with elsewhere():
        for stage in ("reward_model", "ppo", "evaluate"):
            run_stage(stage, params, workspace)
    figures = json.loads(workspace.metrics("evaluate").read_text(encoding="utf-8"))
    assert figures["n"] == params.ingest.splits.test


def test_the_benchmark_for_gpus_runs_elsewhere() -> None:
    with elsewhere():
        found = large.measure(large.SHAPES["tiny"], 1)
    assert found["decode"]["times_faster_than"]["generate"] > 0
    assert found["update"]["operations_per_second"] > 0


def test_a_tensor_in_the_wrong_place_is_refused(policy_folder: Path) -> None:
    with elsewhere():
        x = torch.ones(3, device=THERE)
        assert float((x + torch.tensor(1.0)).sum()) == 6  # a single number may come from anywhere
        for misplaced in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()], lambda: x.numpy()):
            with pytest.raises(RuntimeError, match=r"same device|not supported"):
                misplaced()


def test_without_a_gpu_models_are_put_on_the_cpu(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.device.__wrapped__() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    assert device.device.__wrapped__() == torch.device("cuda", 0)
    assert device.named(torch.device("cuda", 0)) == "a GPU"


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("ppo_core.precision.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert arithmetic.__wrapped__("auto") == expected


def _steps(t: Trainer) -> list[Figures]:
    return [t.step() for _ in range(2)]


def _unusual(folder: Path) -> Trainer:
    sampling = {"top_k": 50, "top_p": 0.9, "min_new_tokens": 2, "stop_strings": ["7"]}
    settings = config("top_layers", sampling=sampling)
    plain: dict[str, Any] = settings.model_dump()
    plain["loss"] |= {"ptx_coef": 0.1, "ptx_batch": 3, "aggregation": "sequences"}
    plain["reward"] |= {"normalise": True, "length_penalty": 0.1, "overlong_buffer": 2, "whiten": True, "kl_in": "loss"}
    plain["update"]["max_approx_kl"] = 100.0
    settings = PPOConfig.model_validate(plain)
    base = load_causal_lm(folder, torch.float32)
    model = ActorCritic(base, settings.model)
    parts: dict[str, RewardFunction] = {
        "model": ModelReward(_reward_model(base), model),
        "function": FunctionReward(lambda prompts, responses: [len(text) for text in responses], str, str),
        "length": LengthReward(4, 0.0, 1.0),
        "own": length_reward,
    }
    reward = CombinedReward(parts, dict.fromkeys(parts, 0.5), worst=False)
    stops = SamplingLaw(settings.sampling, [EOS], lambda ids: " ".join(map(str, ids)))
    texts = [[1, 40, 41, 42], [1, 50, 51], [1, 60]]
    return Trainer(model, reward, PROMPTS, settings, seed=3, law=stops, pad=PAD, ptx=texts)


def _reward_model(base: Any) -> RewardModel:
    trunk, top = split(base, 2)
    scorer = RewardModel(trunk, clone(top), base.config.hidden_size, PAD)
    torch.nn.init.constant_(scorer.head.linear.weight, 0.1)
    return scorer


def _scored(kind: str, folder: Path) -> torch.Tensor:
    """Scores after some training, of texts whose scale was fixed by other texts."""
    if kind == "ready":
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return _calibrated(ReadyScorer(frozen(classifier)))
    if kind == "judge":
        scorer: TextScorer = EncoderScorer(frozen(AutoModel.from_pretrained(folder, dtype=torch.float32)), 0)
    else:
        scorer = _reward_model(load_causal_lm(folder, torch.float32))
    texts = [[1, 40 + i, 41, *range(50, 50 + i)] for i in range(6)]
    pairs = Pairs(texts, chosen=[0, 1, 2], rejected=[3, 4, 5], target=[0.9, 0.8, 1.0])
    fit(
        scorer, pairs, steps=4, batch_pairs=2, learning_rate=1e-3, weight_decay=0.01, seed=1, on_step=lambda *_: None
    )  # fmt: skip
    return _calibrated(scorer)


@torch.no_grad()
def _calibrated(scorer: Any) -> torch.Tensor:
    scorer.head.calibrate(score_texts(scorer, [[1, 40 + i, 41] for i in range(5)]))
    return score_texts(scorer, [[1, 44], [1, 45, 46, 47], [1]]).cpu()
