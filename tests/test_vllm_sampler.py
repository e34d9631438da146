"""Rollouts from a server: with the policy's weights, by its law, written down as the own sampler writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import EOS, MODES, PAD, PROMPTS, config, trainer
from vllm_like import VllmLike, serving

from ppo_core.diagnostics import sampler_gap
from ppo_core.errors import TrainingHealthError
from ppo_core.law import SamplingLaw
from ppo_core.trainer import Trainer
from ppo_core.types import Samples
from tasks import ppo
from tasks.errors import ConfigError, ServiceError
from tasks.models.vllm_sampler import START, URL, VllmSampler
from tasks.params import load_params
from tasks.run_folder import RunFolder
from tasks.workspace import Workspace

pytest_plugins = ["trainings"]
DOCUMENT = Path(__file__).parents[1] / "docs" / "vllm.md"


@pytest.fixture
def vllm(policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmLike]:
    with serving(VllmLike(policy_folder)) as running:
        monkeypatch.setenv(URL, running.url)
        yield running


def served(policy_folder: Path, folder: Path, law: SamplingLaw | None = None, **changes: Any) -> Trainer:
    """A trainer whose rollouts the server answers."""
    t = trainer(policy_folder, config(**changes))
    t.answer = VllmSampler(t.model, law or t.law, folder / "weights", PAD)
    return t


@pytest.mark.parametrize(("trainable", "critic"), MODES)
def test_each_rollout_is_of_the_policy_as_it_is_then(
    policy_folder: Path, tmp_path: Path, vllm: VllmLike, trainable: str, critic: str
):
    """The server's probabilities of its own tokens are those that the trained model gives them."""
    t = served(policy_folder, tmp_path, trainable=trainable, critic=critic, learning_rate=0.02)
    figures = [t.step() for _ in range(3)]
    assert max(f["sampler_gap"] for f in figures) < 1e-4
    assert figures[2]["kl"] > 0.01  # the policy has moved, so old weights would be seen
    each = ["/collective_rpc", "/reset_prefix_cache?reset_running_requests=true", *["/v1/completions"] * 8]
    assert vllm.asked == ["/v1/models", *each * 3]


def test_a_server_that_keeps_its_old_weights_is_found_out(policy_folder: Path, tmp_path: Path, vllm: VllmLike):
    t = served(policy_folder, tmp_path, learning_rate=0.02)
    vllm.keeps_old_weights = True
    assert t.step()["sampler_gap"] < 1e-4
    assert t.step()["sampler_gap"] > 0.2  # warned
    with pytest.raises(TrainingHealthError, match="sampler apart, 2 iterations in a row"):
        t.step()


def test_answers_end_where_the_law_ends_them(policy_folder: Path, tmp_path: Path, vllm: VllmLike):
    """By a stop token, by a stop string (here: the second token whose id ends in 7), or by the cut."""
    sampling = {"max_new_tokens": 12, "min_new_tokens": 2, "temperature": 0.7, "stop_strings": ("7-7",)}
    settings = config(sampling=sampling)
    law = SamplingLaw(settings.sampling, [EOS, *range(0, 120, 10)], _last_digits)
    t = served(policy_folder, tmp_path, law)
    samples = t.answer(PROMPTS * 16, range(64))
    seen = {_checked(samples, row, law) for row in range(64)}
    assert seen == {"stop token", "stop string", "cut"}
    assert all(r["min_tokens"] == 2 and r["temperature"] == 0.7 for r in vllm.requests)
    again = t.answer(PROMPTS * 16, range(64))
    assert torch.equal(samples.sequences.tokens, again.sequences.tokens)


def _last_digits(ids: Any) -> str:
    return "".join(f"{i % 10}-" for i in ids)


def _checked(samples: Samples, row: int, law: SamplingLaw) -> str:
    """How the row's answer ended; that what is written of it fits."""
    mask, length = samples.sequences.mask[row], int(samples.sequences.mask[row].sum())
    assert mask[:length].all()
    tokens = samples.sequences.responses[row].tolist()
    assert set(tokens[length:]) <= {PAD}
    assert (samples.logprobs[row] < 0).tolist() == mask.tolist()
    prompt = samples.sequences.tokens[row, : samples.sequences.prompt_length]
    assert prompt[samples.sequences.attention[row, : len(prompt)]].tolist() == PROMPTS[row % 4]
    tokens = tokens[:length]
    assert length >= 2
    assert not any(token in law.stop_tokens for token in tokens[:-1])
    assert not any("7-7" in _last_digits(tokens[:n]) for n in range(2, length))
    stopped = tokens[-1] in law.stop_tokens
    assert int(samples.text_lengths[row]) == length - stopped
    how = "stop token" if stopped else "stop string" if "7-7" in _last_digits(tokens) else "cut"
    assert bool(samples.ended[row]) == (how != "cut")
    assert how != "cut" or length == 12
    return how


def test_the_stage_trains_with_it_and_goes_on_where_it_was_lost(training: Workspace, vllm: VllmLike):
    params = load_params(training.params, ["ppo.sampler=vllm"])
    with ppo.open_run(params, training) as run:
        run.next_cycle()
        vllm.takes_weights = False
        with pytest.raises(ServiceError):
            run.next_cycle()
    vllm.takes_weights = True
    metrics = ppo.run(params, training).metrics
    folder = RunFolder(training.runs / metrics["fingerprint"])
    assert [r["cycle"] for r in folder.finished()] == [1, 2]
    assert all(r["train/sampler_gap"] < 1e-4 for r in folder.finished())
    assert vllm.asked.count("/collective_rpc") == 5  # two iterations a cycle, and the one that was refused
    assert not list(folder.path.glob("vllm*"))


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_law_that_the_server_does_not_tell_enough_of_is_refused(
    policy_folder: Path, tmp_path: Path, vllm: VllmLike, truncation: dict[str, Any]
):
    with pytest.raises(ConfigError, match="top_k and top_p"):
        served(policy_folder, tmp_path, sampling=truncation)


def test_no_server(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL, "http://someone:secret@127.0.0.1:9")
    with pytest.raises(ServiceError, match="does not answer") as caught:
        served(policy_folder, tmp_path)
    (problem,) = caught.value.problems
    assert "127.0.0.1:9" in problem.where
    assert "secret" not in str(caught.value)
    assert "vllm serve" in problem.mend


def test_a_server_that_takes_no_weights(policy_folder: Path, tmp_path: Path, vllm: VllmLike):
    vllm.takes_weights = False
    with pytest.raises(ServiceError, match=r"refused \(404\).*VLLM_SERVER_DEV_MODE=1"):
        served(policy_folder, tmp_path).step()


def test_a_server_that_does_not_forget_old_weights(policy_folder: Path, tmp_path: Path, vllm: VllmLike):
    vllm.forgets = False
    with pytest.raises(ServiceError, match=r"reset_prefix_cache.*does not forget"):
        served(policy_folder, tmp_path).step()


def test_a_server_of_another_kind(policy_folder: Path, tmp_path: Path, vllm: VllmLike):
    vllm.is_another = True
    with pytest.raises(ServiceError, match=r"v1/models.*answers as vLLM 0\.32 does not"):
        served(policy_folder, tmp_path)


@pytest.mark.parametrize("wrong", [
    {"finish_reason": "abort"}, {"token_ids": []}, {"token_ids": [5] * 99}, {"token_ids": None}, {"logprobs": None},
])  # fmt: skip
def test_an_answer_that_is_none(policy_folder: Path, tmp_path: Path, vllm: VllmLike, wrong: dict[str, Any]):
    complete = vllm._complete
    vllm._complete = lambda **request: complete(**request) | wrong  # type: ignore[method-assign]
    with pytest.raises(ServiceError, match=r"v1/completions.*answers as vLLM 0\.32 does not"):
        served(policy_folder, tmp_path).step()


def test_how_to_start_one_is_said_once_more_in_the_documentation():
    assert " ".join(START.split()) in " ".join(DOCUMENT.read_text(encoding="utf-8").replace("\\\n", " ").split())


def test_the_own_sampler_is_as_near(policy_folder: Path):
    """In float32, of the training pass."""
    figures = trainer(policy_folder, config()).step()
    assert 0 < figures["sampler_gap"] < 1e-5


def test_the_gap_is_a_mean_over_tokens(policy_folder: Path):
    t = trainer(policy_folder, config())
    samples = t.sample()
    rollout = t.score(samples)
    off = replace(samples, logprobs=rollout.logprobs + torch.tensor([0.5, -0.25]).repeat(4).unsqueeze(1))
    lengths = rollout.mask.sum(dim=1)
    expected = (0.5 * lengths[::2].sum() + 0.25 * lengths[1::2].sum()) / lengths.sum()
    assert sampler_gap(off, rollout) == pytest.approx(float(expected))
