"""The model of a recorded cycle: what it holds, what it generates, what it refuses, and how it finds its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from stores import RECORD, trained_weights
from tiny import tiny_params, tiny_policy

from ppo_core import weights
from tasks import tracking
from tasks.params import check_params
from tasks.registration.cycle_model import load_cycle, load_policy
from tasks.tracking import Tracker
from tasks.workspace import Workspace

pytest_plugins = ["stores"]


@pytest.fixture
def cycle_uri(home: Workspace, tmp_path: Path) -> Iterator[str]:
    """A recorded cycle, as `mlflow.pyfunc.load_model` names it."""
    with Tracker.open(home, "a" * 64, check_params(tiny_params())) as tracker:
        tracker.log_cycle(RECORD, trained_weights(home, tmp_path / "policy.safetensors"))
    (model,) = tracker.client.search_logged_models([tracker.run.info.experiment_id])
    previous = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking.tracking_uri(home))
    yield f"models:/{model.model_id}"
    mlflow.set_tracking_uri(previous)


def test_a_cycle_holds_only_what_was_trained(cycle_uri: str, home: Workspace) -> None:
    files = {path.name: path for path in (home.root / "mlartifacts" / "models").rglob("*") if path.is_file()}
    weights = home.root / "policy.safetensors"
    assert files["policy.safetensors"].read_bytes() == weights.read_bytes()
    assert sum(path.stat().st_size for path in files.values()) < weights.stat().st_size + 30_000
    assert not {path.suffix for path in files.values()} & {".pkl", ".bin", ".pt"}


def test_a_cycle_generates_with_its_own_weights(cycle_uri: str, home: Workspace) -> None:
    model = mlflow.pyfunc.load_model(cycle_uri)
    greedy = {"temperature": 0.0, "max_new_tokens": 5}
    texts = ["the film", "her story was so", ""]
    together = model.predict(pd.DataFrame({"prompt": texts}), params=greedy)
    assert together == [model.predict([text], params=greedy)[0] for text in texts]
    assert together == [_oracle(home, text) for text in texts]


def _oracle(home: Workspace, text: str) -> str:
    """Greedy decoding without cache, batch or generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home.base_model)
    model = AutoModelForCausalLM.from_pretrained(home.base_model)
    model.load_state_dict(load_file(home.root / "policy.safetensors"), strict=False)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_sampling_depends_on_the_seed_alone(cycle_uri: str) -> None:
    model = mlflow.pyfunc.load_model(cycle_uri)
    first = model.predict(["the film", "her story"], params={"seed": 3})
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert model.predict(["the film", "her story"], params={"seed": 3}) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert model.predict(["the film", "her story"], params={"seed": 4}) != first
    assert model.predict(["her story"], params={"seed": 4}) == first[1:]


def test_chat_prompts_go_through_the_template(cycle_uri: str, home: Workspace) -> None:
    model = mlflow.pyfunc.load_model(cycle_uri)
    inner = model.unwrap_python_model()
    chat = json.dumps([{"role": "user", "content": "the film<|im_end|>"}])
    ids = inner._encode(0, chat, 1)
    control = {inner.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert sum(token in control for token in ids) == 3
    assert inner.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert inner._encode(0, '["the film"]', 1)[1:] == inner.tokenizer('["the film"]')["input_ids"]
    assert isinstance(model.predict([chat])[0], str)


@pytest.mark.parametrize(
    ("prompt", "asked", "why"),
    [
        ("the film", {"max_new_tokens": 0}, "at least 1"),
        ("the film", {"temperature": -1.0}, "at least 0"),
        ("the film " * 300, {}, "exceed the model's context of 256"),
        ('[{"role": "wizard", "content": "x"}]', {}, "wizard"),
        (None, {}, "a prompt is text"),
    ],
)
def test_what_cannot_be_served_is_refused(cycle_uri: str, prompt: Any, asked: dict[str, Any], why: str) -> None:
    model = mlflow.pyfunc.load_model(cycle_uri)
    with pytest.raises(MlflowException, match=why):
        model.predict(pd.DataFrame({"prompt": ["x", prompt]}), params=asked)


def test_the_base_is_found_by_its_digest(
    cycle_uri: str, home: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = {"temperature": 0.0}
    expected = mlflow.pyfunc.load_model(cycle_uri).predict(["the film"], params=greedy)
    moved = tmp_path / "moved"
    home.base_model.rename(moved)
    tiny_policy(home.base_model, seed=8)  # another model in its place
    with pytest.raises(MlflowException, match="dvc pull models/base"):
        mlflow.pyfunc.load_model(cycle_uri)
    monkeypatch.setenv("PROXIMAL_BASE_MODEL", str(moved))
    assert mlflow.pyfunc.load_model(cycle_uri).predict(["the film"], params=greedy) == expected


def test_tensors_that_do_not_fit_are_refused(policy_folder: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.safetensors"
    save_file({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, strange)
    with pytest.raises(MlflowException, match=r"layers\.9"):
        load_cycle(policy_folder, strange, weights)
    lacking = shutil.copytree(policy_folder, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MlflowException, match=r"missing.*layers\.2"):
        load_policy(lacking)
