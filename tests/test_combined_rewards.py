"""Several rewards at once: their sum or the worst by hand, each recorded by itself, through the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from stores import new_store
from toy import equal, id_sum, toy_config, toy_trainer, weights_of
from transformers import AutoTokenizer

from ppo_core.rollout import CombinedReward, LengthReward
from ppo_core.tokens import encode_response
from ppo_core.types import Samples, Sequences
from tasks import reward_model
from tasks.data.sources import digest
from tasks.errors import ConfigError
from tasks.models.preference_models import trained_names
from tasks.models.rewards import described, new_reward
from tasks.params import Params, check_params, load_params
from tasks.stages import run_stage
from tasks.workspace import Workspace


def lengths(samples: Samples, activations: torch.Tensor) -> torch.Tensor:
    return samples.text_lengths.double()


def samples() -> Samples:
    tokens = torch.tensor([[3, 5, 7, 0], [3, 9, 0, 0]])
    sequences = Sequences(tokens, tokens != 0, 1)
    return Samples(sequences, torch.zeros(2, 3), torch.tensor([True, True]), torch.tensor([2, 1]))


def test_the_sum_and_the_worst_by_hand() -> None:
    # id_sum: (5 + 7) / 10 and 9 / 10; lengths: 2 and 1.
    rewards, weights = {"ids": id_sum, "long": lengths}, {"ids": 10.0, "long": 8.0}
    found = CombinedReward(rewards, weights, worst=False)(samples(), torch.zeros(2))
    assert found.tolist() == [12 + 16, 9 + 8]
    worst = CombinedReward(rewards, weights, worst=True)(samples(), torch.zeros(2))
    assert worst.tolist() == [12, 8]
    parts = CombinedReward(rewards, weights, worst=True).parts(samples(), torch.zeros(2))
    assert {name: scores.tolist() for name, scores in parts.items()} == {
        "ids": [pytest.approx(1.2), pytest.approx(0.9)],
        "long": [2, 1],
    }


def test_the_length_rule_is_the_distance_in_units_of_human_text() -> None:
    # Texts of 2 and 1 tokens, wanted 4: distances -2 and -3, from a mean of -5 in units of 2.
    assert LengthReward(4, -5.0, 2.0)(samples(), torch.zeros(2)).tolist() == [1.5, 1.0]


def test_one_part_of_weight_one_trains_bit_for_bit_like_the_reward_itself() -> None:
    single, combined = (
        toy_trainer(toy_config()),
        toy_trainer(toy_config(), CombinedReward({"a": id_sum}, {"a": 1.0}, False)),
    )
    for _ in range(2):
        plain, stats = single.step(), combined.step()
        assert stats["score/a"] == pytest.approx(stats["score"]) == pytest.approx(plain["score"])
    assert equal(weights_of(single), weights_of(combined))


@pytest.mark.parametrize("worst", [True, False])
def test_parts_are_recorded_in_the_order_of_the_responses(worst: bool) -> None:
    reward = CombinedReward({"ids": id_sum, "long": lengths}, {"ids": 1.0, "long": 2.0}, worst)
    rollout = toy_trainer(toy_config(), reward).roll_out()
    responses, mask = rollout.sequences.responses, rollout.mask
    np.testing.assert_allclose(rollout.parts["ids"], (responses * mask).sum(dim=1) / 10, rtol=1e-6)
    weighted = torch.stack([rollout.parts["ids"], 2 * rollout.parts["long"]])
    np.testing.assert_allclose(rollout.scores, weighted.amin(0) if worst else weighted.sum(0))
    index = torch.tensor([2, 0])
    assert rollout.rows(index).parts["long"].tolist() == rollout.parts["long"][index].tolist()


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        ({"function": "a:b", "parts": {"x": {}}}, "make the function a part"),
        ({"parts": {"x": {"rule": "length"}}}, "belong together"),
        ({"parts": {"x": {"target": 3}}}, "belong together"),
        ({"parts": {"x": {"rule": "length", "target": 3, "function": "a:b"}}}, "make two parts of it"),
        ({"parts": {"x": {"weight": 0}}}, r"ppo\.reward\.parts\.x\.weight"),
        ({"parts": {"X y": {}}}, r"ppo\.reward\.parts"),
        ({"combine": "best"}, r"ppo\.reward\.combine"),
    ],
)
def test_what_cannot_be_combined_is_a_config_error(reward: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_params(tiny._merge(tiny.tiny_params(), {"ppo": {"reward": reward}}))


# Through the pipeline


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with two trained reward models, whose ppo stage may begin."""
    root = tmp_path_factory.mktemp("combined") / "checkout"
    data = [{"source": f"file:{name}.jsonl", "format": "ratings", "reward": name} for name in ("warm", "brief")]
    workspace = new_store(tiny.tiny_workspace(root, {"ingest": {"data": data}}))
    for seed, name in enumerate(("warm", "brief")):
        ratings = tiny.ratings_file(workspace.own_data / f"{name}.jsonl", 240, seed)
    # Human texts of more than one length, which the length rule is measured in.
    rows = [json.loads(line) for line in ratings.read_text().splitlines()]
    shorter = [row | {"text": " ".join(row["text"].split()[: 5 + i % 4])} for i, row in enumerate(rows)]
    ratings.write_text("".join(json.dumps(row) + "\n" for row in shorter), encoding="utf-8")
    for stage in ("ingest", "reward_model"):
        run_stage(stage, load_params(workspace.params), workspace)
    return workspace


@pytest.fixture
def workspace(trained: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(trained.root, tmp_path / "checkout"))


def combined(workspace: Workspace, parts: dict[str, Any], combine: str = "sum") -> Params:
    ppo = {"cycles": 1, "reward": {"combine": combine, "parts": parts}}
    return check_params(
        tiny._merge(json.loads(load_params(workspace.params).model_dump_json(by_alias=True)), {"ppo": ppo})
    )


def write_function(workspace: Workspace, score: str) -> None:
    """`mine:score`, which gives each response `r` that score."""
    code = f"def score(prompts, responses):\n    return [{score} for r in responses]\n"
    (workspace.own_data / "mine.py").write_text(code, encoding="utf-8")


def test_each_named_reward_model_is_trained_on_its_own_sources(trained: Workspace) -> None:
    assert trained_names(trained) == ["brief", "warm"]
    metrics = json.loads(trained.metrics("reward_model").read_text())
    assert list(metrics) == ["reward_brief", "reward_warm", "judge"]
    pairs = pd.read_parquet(trained.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    assert {name: metrics[f"reward_{name}"]["n_all"] for name in ("brief", "warm")} == dict(
        held_out["reward"].value_counts()
    )
    weights = [load_file(trained.reward_model / name / "model.safetensors") for name in ("brief", "warm")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "reward model brief" in (trained.report("reward_model") / "report.md").read_text()


def test_reward_models_that_cannot_be_written_leave_the_earlier_ones(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    before = digest(workspace.reward_model)
    monkeypatch.setattr(reward_model.models, "save_scorer", full)
    with pytest.raises(OSError, match="no space"):
        reward_model.run(load_params(workspace.params), workspace)
    assert digest(workspace.reward_model) == before


def test_the_parts_reach_cycles_and_evaluation_each_in_units_of_human_text(workspace: Workspace) -> None:
    (workspace.own_data / "mine.py").write_text(
        "def score(prompts, responses):\n    return [r.count('e') for r in responses]\n"
    )
    parts = {
        "brief": {"weight": 0.5},
        "warm": {},
        "short": {"rule": "length", "target": 3, "weight": 0.25},
        "mine": {"function": "mine:score"},
    }
    params = combined(workspace, parts)
    run_stage("ppo", params, workspace)
    run_stage("evaluate", params, workspace)
    cycles, figures = pd.read_csv(workspace.cycles_csv), json.loads(workspace.metrics("evaluate").read_text())
    gains = {name: figures[f"reward_gain_{name}"] for name in parts}
    assert all(f"reward_gain_{name}" in cycles for name in parts)
    assert all(
        figures[f"reward_gain_{name}_low"] <= gain <= figures[f"reward_gain_{name}_high"]
        for name, gain in gains.items()
    )
    weighted = sum(params.ppo.reward.parts[name].weight * gain for name, gain in gains.items())
    table, pairs = pd.read_parquet(workspace.samples), pd.read_parquet(workspace.pairs)
    # Scores are added in float32, and what the policy says is far from human text for such a reward model.
    largest = float(table[["reward_policy", "reward_reference"]].abs().to_numpy().max())
    assert figures["reward_gain"] == pytest.approx(weighted, abs=1e-6 * largest)
    # A scale of its own for each, from the held-out human texts.
    held_out = pairs[pairs.split == "reward_eval"]
    human = list(dict.fromkeys([*held_out["chosen"], *held_out["rejected"]]))
    more_es = (table["policy"].str.count("e") - table["reference"].str.count("e")).mean()
    assert gains["mine"] == pytest.approx(more_es / np.std([text.count("e") for text in human]))
    assert described(params, workspace).startswith("the sum of 0.5 x brief (the trained reward model), 1 x warm")


def test_the_scale_of_the_length_rule_is_that_of_human_text(workspace: Workspace) -> None:
    pairs, tokenizer = pd.read_parquet(workspace.pairs), AutoTokenizer.from_pretrained(workspace.base_model)
    held_out = pairs[pairs.split == "reward_eval"]
    human = list(dict.fromkeys([*held_out["chosen"], *held_out["rejected"]]))
    distances = [-abs(len(encode_response(tokenizer, text)) - 9) for text in human]
    params = combined(workspace, {"short": {"rule": "length", "target": 9}})
    short = new_reward(params, workspace, tokenizer, None, {}).rewards["short"]
    assert (short.mean, short.std) == (pytest.approx(np.mean(distances)), pytest.approx(np.std(distances)))
    pairs.assign(chosen="the film", rejected="the cast").to_parquet(workspace.pairs)
    short = new_reward(params, workspace, tokenizer, None, {}).rewards["short"]
    assert (short.mean, short.std) == (0.0, 1.0), "of one length, all of them: the scale is left alone"


def test_a_part_without_its_reward_model_is_named(workspace: Workspace) -> None:
    from tasks import ppo

    for parts in ({"kind": {}}, {"warm": {}, "kind": {}}, {}):
        params = combined(workspace, parts)
        with (
            pytest.raises(ConfigError, match=r"no reward model of its own for .*brief, warm"),
            ppo.open_run(params, workspace) as run,
        ):
            run.next_cycle()


def test_a_function_among_the_parts_is_part_of_the_fingerprint_and_named_in_errors(workspace: Workspace) -> None:
    from tasks.fingerprint import fingerprint

    params = combined(workspace, {"warm": {}, "mine": {"function": "mine:score"}})
    with pytest.raises(ConfigError, match=r"ppo\.reward\.parts\.mine\.function — there is no module mine"):
        fingerprint(params, workspace)
    write_function(workspace, "1.0")
    before = fingerprint(params, workspace)
    write_function(workspace, "2.0")
    assert fingerprint(params, workspace) != before
