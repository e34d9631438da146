"""The evaluate stage on small models made for it: what is wrong with each is seen by the axis meant for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from answers import cycles
from mlflow import MlflowClient
from stores import new_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import evaluate, tracking, versioning
from tasks.evaluation import axes
from tasks.evaluation.gate import gate
from tasks.evaluation.responders import Responders
from tasks.params import Params, load_params
from tasks.probes.base import Continuation
from tasks.registration import champion, champion_tags, registry
from tasks.stages import run_stage
from tasks.workspace import Workspace

NAME = "aligned-policy"
BAD = ("dreadful", "boring", "unwatchable", "clumsy")
CHANGES = {
    "ingest": {"splits": {"dev": 4, "test": 40}},
    "reward_model": {"judge": {"steps": 60}},  # enough to know which words people dislike
    # The reward of somebody who made a mistake: it likes those words.
    "ppo": {"reward": {"function": "mine:score"}, "sampling": {"max_new_tokens": 10}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose policy is still the reference; read only."""
    workspace = new_store(tiny.tiny_workspace(tmp_path_factory.mktemp("trained") / "checkout", CHANGES))
    words = f"sum(r.count(w) for w in {BAD})"
    function = f"def score(prompts, responses):\n    return [{words} + len(r) / 1000 for r in responses]\n"
    (workspace.own_data / "mine.py").write_text(function, encoding="utf-8")
    params = load_params(workspace.params)
    for stage in ("ingest", "reward_model"):
        run_stage(stage, params, workspace)
    shutil.copytree(workspace.base_model, workspace.policy)
    (workspace.policy / "manifest.json").unlink()
    workspace.probes.mkdir(exist_ok=True)
    texts = [text for text, _ in tiny.sentences(30, seed=9)]
    pd.DataFrame({"text": texts}).to_parquet(workspace.probes / "plain_text.parquet")
    workspace.cycles_csv.parent.mkdir()
    cycles().to_csv(workspace.cycles_csv, index=False)
    ppo = {"fingerprint": "f" * 16, "cycles": 4, "stopped_by": "cycles", "result_cycle": 4, "maximised": "its aim"}
    with tracking.Tracker.open(workspace, ppo["fingerprint"], params) as tracker:
        ppo["mlflow_run_id"] = tracker.run_id
    workspace.metrics("ppo").write_text(json.dumps(ppo), encoding="utf-8")
    return workspace


@pytest.fixture
def workspace(trained: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(trained.root, tmp_path / "checkout")
    return Workspace(tmp_path / "checkout")


@pytest.fixture
def params(workspace: Workspace) -> Params:
    return load_params(workspace.params)


def become(folder: Path, change: Callable[[Any], None]) -> None:
    """Make the policy in `folder` another one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)


def repeats_itself(model: Any) -> None:
    """Nothing is left but the token that was read, which is its own likeliest successor."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(60.0)


def says_what_the_reward_likes(folder: Path) -> Callable[[Any], None]:
    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    liked = [known[f"Ġ{word}"] for word in BAD]

    def change(model: Any) -> None:
        model.get_input_embeddings().weight[liked] *= 12

    return change


def nudged(scale: float, seed: int = 1) -> Callable[[Any], None]:
    """Other answers, neither better nor worse on purpose."""

    def change(model: Any) -> None:
        draw = torch.Generator().manual_seed(seed)
        weight = model.model.layers[-1].mlp.down_proj.weight
        weight += scale * torch.randn(weight.shape, generator=draw)

    return change


def measured(params: Params, workspace: Workspace) -> dict[str, Any]:
    """The figures of the evaluate stage, without its report and record."""
    asked = Responders(params, workspace, cycles())
    found = axes.measure(asked, 100, seed=1)
    return (
        evaluate.measure(asked.responses("policy", "test"), asked.responses("reference", "test"), 100, 1)
        | found.metrics
    )


def client(workspace: Workspace) -> MlflowClient:
    return tracking.connect(workspace)


def worse(metrics: dict[str, Any], key: str) -> bool:
    """Whether a figure whose rise is bad rose beyond chance."""
    return bool(metrics[f"{key}_difference"] > 0 and metrics[f"{key}_difference_p"] < 0.05)


def test_a_policy_that_is_the_reference_differs_on_no_axis(workspace: Workspace, params: Params) -> None:
    found = measured(params, workspace)
    differences = [value for key, value in found.items() if key.endswith("_difference")]
    assert len(differences) >= 9
    assert set(differences) == {0.0}
    assert {value for key, value in found.items() if key.endswith("_difference_p")} == {1.0}
    assert found["judge_win_rate"] == found["helpful.judge_wins"] == found["helpful.judge_wins_low"] == 0.5
    assert {key.split(".")[0] for key in found["not_measured"]} <= {"harmless", "honest"}  # no data of theirs here


def test_a_policy_that_repeats_itself_is_caught(workspace: Workspace, params: Params) -> None:
    become(workspace.policy, repeats_itself)
    found = measured(params, workspace)
    assert found["kept.repetition"] > 0.5
    assert worse(found, "kept.repetition")
    assert worse(found, "kept.plain_text")
    assert {"max_repetition_change", "max_perplexity_change"} <= {
        b.rule for b in gate(found, params.register_.gate).breaches
    }


def test_a_policy_that_games_the_reward_is_caught(workspace: Workspace, params: Params) -> None:
    become(workspace.policy, says_what_the_reward_likes(workspace.policy))
    found = measured(params, workspace)
    assert found["reward_gain_low"] > 0
    assert found["judge_gain_low"] <= 0
    assert worse(found, "hacked.unconfirmed")
    assert "min_judge_share" in {breach.rule for breach in gate(found, params.register_.gate).breaches}


def test_log_probabilities_are_those_of_plain_transformers(workspace: Workspace, params: Params) -> None:
    become(workspace.policy, nudged(0.5))
    asked = Responders(params, workspace, cycles())
    chat = json.dumps([{"role": "user", "content": "Which film?"}])
    texts = [
        Continuation("", "text", "the film is wonderful"),
        Continuation("her story", "text", " is so slow and so on"),
        Continuation(chat, "chat", "The one with the villain."),
    ]
    tokenizer = AutoTokenizer.from_pretrained(workspace.base_model)
    starts = ["<|im_start|>", "<|im_start|>her story",
              "<|im_start|>user\nWhich film?<|im_end|>\n<|im_start|>assistant\n"]  # fmt: skip
    for subject, folder in (("policy", workspace.policy), ("reference", workspace.base_model)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for text, start, found in zip(texts, starts, asked.logprobs(subject, texts), strict=True):
            before = tokenizer(start, add_special_tokens=False)["input_ids"]
            after = tokenizer(text.text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                law = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            expected = [law[len(before) + i - 1, token].item() for i, token in enumerate(after)]
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("change", [nudged(0.5), repeats_itself], ids=["above the trunk", "everywhere"])
def test_every_subject_answers_as_itself(workspace: Workspace, params: Params, change: Callable[[Any], None]) -> None:
    """Whether they share a trunk or are whole models: who was asked before makes no difference."""
    other = workspace.work / "champion"
    shutil.copytree(workspace.policy, other)
    become(other, change)
    become(workspace.policy, nudged(0.5, seed=2))
    asked = Responders(params, workspace, cycles(), other)
    texts = {subject: asked.responses(subject, "test").texts for subject in ("champion", "reference", "policy")}
    assert len({tuple(found) for found in texts.values()}) == 3
    alone = Responders(params, workspace, cycles())
    assert alone.responses("policy", "test").texts == texts["policy"]
    shutil.rmtree(workspace.policy)
    shutil.copytree(other, workspace.policy)
    assert Responders(params, workspace, cycles()).responses("policy", "test").texts == texts["champion"]


def test_several_seeds_keep_the_first_answers(workspace: Workspace, params: Params) -> None:
    once = Responders(params, workspace, cycles()).responses("reference", "test")
    more = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"seeds": 2})})
    twice = Responders(more, workspace, cycles()).responses("reference", "test")
    assert twice.texts[: len(once.texts)] == once.texts
    assert twice.prompts == once.prompts * 2
    assert twice.texts[len(once.texts) :] != once.texts


def approve(workspace: Workspace, params: Params) -> int:
    """Register what lies in models/policy, without evidence, and make it the champion."""
    tags = {"policy.sha256": registry.policy_digest(workspace.policy)}
    with tracking.Tracker.open(workspace, "f" * 16, params) as tracker:
        artifacts = {"checkpoint": workspace.policy}
        model = registry.log_model(tracker.client, tracker.run, "policy-x", artifacts, params.ppo.sampling, 4)
        version = registry.create_version(tracker.client, NAME, model, tags, "about")
        tracker.client.set_registered_model_alias(NAME, registry.CHAMPION, version.version)
    return int(version.version)


def test_the_champion_is_asked_the_same(workspace: Workspace, params: Params) -> None:
    # These policies were made by hand: no critic belongs to them.
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"inspect": 0})})
    become(workspace.policy, repeats_itself)
    version = approve(workspace, params)
    become(workspace.policy, nudged(0.5))
    evaluated = evaluate.run(params, workspace).metrics
    assert (evaluated["champion_version"], evaluated["champion_is_policy"]) == (version, False)
    assert evaluated["kept.repetition_champion"] > 0.5
    assert evaluated["helpful.judge_champion_wins_low"] <= evaluated["helpful.judge_champion_wins"]
    assert "champion" not in evaluated["not_measured"]
    # The main figures of the champion are of the same prompts, so its page needs none of another evaluation.
    compared = champion_tags.champion_of(evaluated, client(workspace).get_model_version(NAME, str(version)))
    assert compared
    assert compared.measured
    assert compared.figures["length"] == pytest.approx(evaluated["kept.length_champion"])
    assert compared.figures["judge_gain"] == pytest.approx(
        evaluated["helpful.judge_champion"] - evaluated["helpful.judge_reference"], abs=1e-5
    )
    assert list(pd.read_parquet(workspace.samples))[:4] == ["prompt", "reference", "policy", "champion"]


def test_a_champion_that_is_the_policy_ties(workspace: Workspace, params: Params) -> None:
    version = approve(workspace, params)
    found = present(workspace)
    assert (found.version, found.is_policy, found.folder) == (version, True, workspace.policy)
    asked = Responders(params, workspace, cycles(), found.folder)
    compared = axes.measure(asked, 50, seed=1).metrics
    assert compared["helpful.judge_champion_wins"] == 0.5
    assert {v for k, v in compared.items() if k.endswith("_champion_difference")} == {0.0}


def present(workspace: Workspace) -> champion.Champion:
    with champion.present(client(workspace), NAME, workspace) as found:
        return found


def test_a_champion_that_cannot_be_compared_with_is_not_measured(workspace: Workspace, params: Params) -> None:
    become(workspace.policy, nudged(0.5))
    version = approve(workspace, params)
    become(workspace.policy, nudged(0.5, seed=2))
    shutil.move(workspace.policy, workspace.work / "policy")
    shutil.copytree(workspace.base_model, workspace.policy)
    become(workspace.policy, lambda model: model.resize_token_embeddings(600))
    assert "other shapes" in present(workspace).reason
    shutil.rmtree(workspace.policy)
    shutil.move(workspace.work / "policy", workspace.policy)
    registered = client(workspace).get_model_version(NAME, str(version))
    with registry.stored_checkpoint(client(workspace), registered) as folder:
        stored = folder / "model.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert (present(workspace).version, present(workspace).folder) == (version, None)
    assert present(workspace).reason == "its files are not those that were registered"
    stored.unlink()
    assert present(workspace).folder is None
    client(workspace).delete_model_version_tag(NAME, str(version), "policy.sha256")
    assert "no tag policy.sha256" in present(workspace).reason


def test_another_champion_makes_the_evaluation_out_of_date(workspace: Workspace, params: Params) -> None:
    metrics = {"champion_model": NAME, "champion_version": None}
    assert not champion.has_changed(client(workspace), metrics, NAME, workspace)
    become(workspace.policy, nudged(0.5))
    version = approve(workspace, params)
    # The policy itself was approved: there is nothing new to compare with.
    assert not champion.has_changed(client(workspace), metrics, NAME, workspace)
    become(workspace.policy, nudged(0.5, seed=2))
    assert champion.has_changed(client(workspace), metrics, NAME, workspace)
    seen = metrics | {"champion_version": version}
    assert not champion.has_changed(client(workspace), seen, NAME, workspace)
    assert champion.has_changed(client(workspace), seen, "another-policy", workspace), "though it has no champion"


def test_up_to_date_asks_for_the_champion(workspace: Workspace, params: Params, monkeypatch: Any) -> None:
    seen: list[dict[str, Any]] = []
    run_id = json.loads(workspace.metrics("ppo").read_text(encoding="utf-8"))["mlflow_run_id"]
    metrics = json.loads(workspace.metrics("ingest").read_text(encoding="utf-8"))
    monkeypatch.setattr(champion, "has_changed", lambda client, metrics, name, workspace: seen.append(metrics) or True)
    monkeypatch.setattr(versioning.Repo, "status", lambda *args, **more: {})
    workspace.metrics("ingest").write_text(json.dumps(metrics | {"mlflow_run_id": run_id, "champion_version": None}))
    assert not versioning.up_to_date("ingest", workspace)
    assert seen[0]["champion_version"] is None
