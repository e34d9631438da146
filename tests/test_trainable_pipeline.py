"""What PPO trains, through the stages: stored small, merged, evaluated, served, and each time the very same policy."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import tiny
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from stores import new_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_core.law import SamplingLaw
from ppo_core.models import ActorCritic
from ppo_core.types import Sequences
from tasks import ppo
from tasks.evaluation.responders import Responders
from tasks.inspector.inspection import Inspector
from tasks.models.preference_models import load_base
from tasks.params import Params, load_params
from tasks.stages import StageResult, run_stage, write_metrics
from tasks.tracking import tracking_uri
from tasks.workspace import Workspace

LAW = {"top_k": 60, "top_p": 0.95, "min_new_tokens": 2, "temperature": 0.8, "stop_strings": ["!"], "stop_tokens": ["?"]}
MODES: dict[str, dict[str, Any]] = {
    "lora": {
        "model": {"trainable": "lora", "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}},
        "sampling": LAW,
        "loss": {"ptx_coef": 0.5, "ptx_batch": 2},
        "update": {"learning_rate": 2.0e-2},
    },
    "full": {
        "model": {"trainable": "full", "critic": "separate", "gradient_checkpointing": True},
        "reward": {"kl_in": "loss", "normalise": True},
        "loss": {"aggregation": "sequences"},
    },
    "top_layers": {
        "model": {"critic": "separate", "dtype": "bfloat16"},
        "sampling": {"stop_tokens": ["?"]},
        "update": {"critic_warmup": 1, "schedule": "cosine", "learning_rate": 2.0e-2},
    },
}
GREEDY = {"temperature": 0.0, "min_new_tokens": 0, "max_new_tokens": 5, "stop_tokens": [], "stop_strings": []}
TEXTS = ["the film", "her story was so"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose ppo stage may begin."""
    workspace = new_store(tiny.tiny_workspace(tmp_path_factory.mktemp("ready") / "checkout"))
    for stage in ("ingest", "reward_model"):
        run_stage(stage, load_params(workspace.params), workspace)
    write_metrics("validate", StageResult({"expectations": {"checked": 1, "passed": 1}}, ""), workspace)
    return workspace


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_that_was_trained_is_the_one_that_is_evaluated_and_served(
    ready: Workspace, tmp_path: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    workspace = Workspace(shutil.copytree(ready.root, tmp_path / "checkout"))
    params = changed(workspace, MODES[mode])
    with ppo.open_run(params, workspace) as run:
        while run.stopped is None:
            run.next_cycle()
        write_metrics("ppo", run.finish(), workspace)
        trained = run._ready().model.language_model_logprobs(some_texts())
        valued = values(run._ready().model, run.examiner.law)
        weights = run.folder.weights(2)

    # evaluated
    responders = Responders(params, workspace, pd.read_csv(workspace.cycles_csv))
    assert (responders.responses("policy", "test").kl != 0).any()
    torch.testing.assert_close(responders.model.language_model_logprobs(some_texts()), trained, atol=1e-4, rtol=0)
    responders.responses("reference", "test")
    before = responders.model.language_model_logprobs(some_texts())
    assert (before - trained).abs().max() > 0.01

    # inspected
    inspector = Inspector(params, workspace, [])
    inspector.become(None)
    torch.testing.assert_close(values(inspector.model, inspector.law), valued, atol=1e-4, rtol=1e-3)
    assert valued.abs().min() > 0

    # stored
    policy = AutoModelForCausalLM.from_pretrained(workspace.policy)
    if mode == "lora":
        assert set(policy.state_dict()) == set(load_base(workspace, "float32").state_dict())
        assert not list(workspace.policy.glob("adapter*"))
        by_hand(load_file(weights), load_base(workspace, "float32").state_dict(), policy.state_dict())
    for stage in ("evaluate", "register"):
        run_stage(stage, params, workspace)

    # served
    request.addfinalizer(partial(mlflow.set_tracking_uri, mlflow.get_tracking_uri()))
    mlflow.set_tracking_uri(tracking_uri(workspace))
    expected = [greedy(policy, workspace, text) for text in TEXTS]
    for name, where in models(workspace).items():
        served = mlflow.pyfunc.load_model(f"models:/{where.model_id}")
        if name != "policy-cycle-1":
            assert served.predict(TEXTS, params=GREEDY) == expected, name
        stored = [f for f in Path(where.artifact_location.removeprefix("file://")).rglob("*") if f.is_file()]
        if name.startswith("policy-cycle"):
            assert sum(file.stat().st_size for file in stored) < weights.stat().st_size + 60_000
        law = {spec.name: spec.default for spec in served.metadata.signature.params}
        asked = params.ppo.sampling
        assert (law["top_k"], law["top_p"]) == (asked.top_k or 0, asked.top_p or 1.0)
        assert (law["stop_tokens"], law["stop_strings"]) == (list(asked.stop_tokens), list(asked.stop_strings))
        assert law["min_new_tokens"] == asked.min_new_tokens


def by_hand(trained: dict[str, torch.Tensor], base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> None:
    """W + alpha / rank B A where there is an adapter, and nothing else moved."""
    layers = {name.removesuffix(".lora_A.weight") for name in trained if name.endswith("lora_A.weight")}
    assert len(layers) == 8  # q_proj and down_proj of four layers
    for name, before in base.items():
        layer = name.removesuffix(".weight")
        update = torch.zeros_like(before)
        if layer in layers:
            update = 32 / 4 * trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"]
            assert update.any()
        torch.testing.assert_close(merged[name], before + update, msg=name)


def changed(workspace: Workspace, ppo_section: dict[str, Any]) -> Params:
    plain = tiny._merge(tiny.tiny_params(), {"ppo": ppo_section})
    workspace.params.write_text(json.dumps(plain), encoding="utf-8")  # JSON is YAML
    return load_params(workspace.params)


@torch.no_grad()
def values(model: ActorCritic, law: SamplingLaw) -> torch.Tensor:
    texts = some_texts()
    return model.evaluate(model.activations(texts), texts, law).values


def some_texts() -> Sequences:
    tokens = torch.arange(40, 88).view(4, 12)
    return Sequences(tokens, torch.ones_like(tokens, dtype=torch.bool), prompt_length=1)


def greedy(model: Any, workspace: Workspace, text: str) -> str:
    """Greedy decoding without cache, batch or generate()."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.policy)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def models(workspace: Workspace) -> dict[str, Any]:
    """The logged models by name: two cycles, and the evaluated policy."""
    client = MlflowClient(tracking_uri(workspace))
    (experiment,) = client.search_experiments(filter_string="name = 'alignment'")
    found = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    assert len(found) == 3
    return found
