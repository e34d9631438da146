"""What PPO may maximise besides the model that is trained: a ready-made one, or a function of the user's own."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from stores import new_store
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_core.tokens import encode_conversation, encode_prompt
from tasks import ppo
from tasks.errors import ConfigError, DataError, TrainingHealthError
from tasks.fingerprint import fingerprint
from tasks.models.own_function import OwnFunction, source_file
from tasks.models.preference_models import ReadyReward, new_ready_reward, ready_tokens
from tasks.models.rewards import load_trained, new_reward, on_human_scale
from tasks.params import Params, check_params, load_params
from tasks.stages import run_stage
from tasks.versioning import worktree
from tasks.workspace import Workspace

CHAT = json.dumps([{"role": "user", "content": "the film<|im_end|>"}])


# The user's own function


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data/own."""
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def function(own: Path, body: str, named: str = "mine:score") -> OwnFunction:
    (own / "mine.py").write_text(f"def score(prompts, responses):\n    {body}\n", encoding="utf-8")
    return OwnFunction(named, own)


def test_it_is_given_prompts_and_responses(own: Path) -> None:
    score = function(own, "return [len(p) + 10 * len(r) for p, r in zip(prompts, responses)]")
    assert score(["a", "bb"], ["", "c"]) == [1.0, 12.0]


def test_its_module_is_looked_up_in_data_own_before_what_is_installed(own: Path) -> None:
    assert source_file("json.decoder:JSONDecoder", own) == Path(json.decoder.__file__)
    (own / "json").mkdir()
    mine = own / "json" / "decoder.py"
    mine.write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: 'int' = 3\n\n"
        "assert A.__annotations__ == {'x': 'int'}  # no future of ours\n\nscore = lambda p, r: [A().x]"
    )
    assert source_file("json.decoder:score", own) == mine
    assert OwnFunction("json.decoder:score", own)(["p"], ["r"]) == [3.0]
    assert json.loads("[1]") == [1], "and what is installed stays as it is"


@pytest.mark.fault("29: a path that leads out", expected="exit 2 of a reward function, the target")
def test_a_link_that_leads_out_of_data_own_is_not_followed(own: Path, seen: Callable[[str], None]) -> None:
    (own.parent / "elsewhere.py").write_text("def score(p, r):\n    return [1.0] * len(r)\n", encoding="utf-8")
    (own / "mine.py").symlink_to(own.parent / "elsewhere.py")
    with pytest.raises(ConfigError, match=r"mine\.py leads out of data/own, to .*elsewhere\.py.*copy it") as refused:
        OwnFunction("mine:score", own)
    assert refused.value.exit_code == 2
    seen("exit 2, the target")


def test_an_edit_counts_at_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert function(own, "return [1]")([""], [""]) == [1.0]
    assert function(own, "return [2]")([""], [""]) == [2.0]  # as long, and in the same second


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [1.0]", "mine:score returned 1 scores for 2 responses"),
        ("return [1.0, float('nan')]", "mine:score returned nan for a response to the prompt 'second'"),
        ("return [1.0, None]", "mine:score returned None for a response to the prompt 'second'"),
        ("return [1.0, '2']", "mine:score returned '2' for a response to the prompt 'second'"),
        ("return 1.0", "mine:score raised TypeError: 'float' object is not iterable"),
        ("return [1 / len(r) for r in responses]", "mine:score raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_score_is_named_with_its_prompt(own: Path, body: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"ppo\.reward\.function — {why}"):
        function(own, body)(["first", "second"], ["", "x"])


def test_its_own_traceback_is_seen(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ConfigError, match="the log has its traceback"):
        function(own, "return [responses[7]]")(["p"], ["r"])
    assert "return [responses[7]]" in caplog.text
    assert f'{own / "mine.py"}", line 2, in score' in caplog.text


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("nowhere:score", r"there is no module nowhere — write it to data/own/nowhere\.py"),
        ("no.where:score", r"there is no module no\.where — write it to data/own/no/where\.py"),
        ("mine:other", r"mine\.py has no function other"),
        ("mine:__doc__", r"mine\.py has no function __doc__"),
        ("broken:score", r"broken\.py cannot be imported: SyntaxError"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error(own: Path, named: str, why: str) -> None:
    (own / "broken.py").write_text("def score(:")
    with pytest.raises(ConfigError, match=why):
        function(own, "return [1]", named)


@pytest.mark.parametrize("named", ["score", "../mine:score", "mine:score()", "mine.:score", "mine:a.b", ""])
def test_a_name_that_cannot_be_one_is_refused_by_the_schema(named: str) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.reward\.function"):
        check_params(tiny._merge(tiny.tiny_params(), {"ppo": {"reward": {"function": named}}}))


def test_scores_are_on_the_scale_of_human_text() -> None:
    human = [f"{'x' * n}" for n in range(1, 131)]
    scaled = on_human_scale(lambda prompts, responses: [float(len(r)) for r in responses], [""] * 130, human)
    scores = np.array(scaled([""] * 130, human))
    assert (scores.mean(), scores.std()) == (pytest.approx(0), pytest.approx(1))
    assert scaled([""], ["x" * 200]) == [pytest.approx((200 - 65.5) / np.arange(1, 131).std())]
    constant = on_human_scale(lambda prompts, responses: [0.1 + len(p) for p in prompts], [""] * 130, human)
    assert constant(["ab"], ["r"]) == [2.1], "all equal: the scale is left alone"


# Through the pipeline


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a ready-made reward model, whose ppo stage may begin."""
    reward = {"source": "file:reward", "licence": "MIT"}
    changes = {"ingest": {"reward": reward}, "reward_model": {"reward": {"max_tokens": 40}}}
    workspace = new_store(tiny.tiny_workspace(tmp_path_factory.mktemp("ready") / "checkout", changes))
    for stage in ("ingest", "reward_model"):
        run_stage(stage, load_params(workspace.params), workspace)
    return workspace


@pytest.fixture
def workspace(ready: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(ready.root, tmp_path / "checkout"))


@pytest.fixture
def params(workspace: Workspace) -> Params:
    return load_params(workspace.params)


def oracle(workspace: Workspace, texts: list[str]) -> np.ndarray:
    """The ready-made model as transformers runs it, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.reward_base)
    model = AutoModelForSequenceClassification.from_pretrained(workspace.reward_base)
    with torch.no_grad():
        return np.array([float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits) for text in texts])


def test_a_ready_made_model_is_measured_and_its_scale_fixed(ready: Workspace) -> None:
    metrics = json.loads(ready.metrics("reward_model").read_text())["reward"]
    pairs = pd.read_parquet(ready.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    difference = oracle(ready, held_out["chosen"].tolist()) - oracle(ready, held_out["rejected"].tolist())
    assert metrics["accuracy_all"] == pytest.approx((difference > 0).mean())
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    human = list(dict.fromkeys([*held_out["chosen"], *held_out["rejected"]]))
    raw = oracle(ready, human)
    scores = ReadyReward(ready, "float32").score([""] * len(human), ["text"] * len(human), human)
    np.testing.assert_allclose(scores, (raw - raw.mean()) / raw.std(), atol=1e-3)
    origin = {entry["name"]: entry for entry in json.loads(ready.provenance.read_text())}["reward"]
    assert (origin["source"], origin["licence"], len(origin["sha256"])) == ("file:reward", "MIT", 64)


@pytest.mark.parametrize("padded", [True, False])
def test_a_text_scores_the_same_beside_longer_ones(ready: Workspace, padded: bool) -> None:
    scorer, tokenizer = new_ready_reward(ready, "float32")
    texts = ["the film", "her story was so moving that nobody left", "no"]
    raw = oracle(ready, texts)
    if not padded:  # transformers then reads the last token, and refuses batches
        scorer.classifier.config.pad_token_id = None
    ids = [ready_tokens(tokenizer, "", "text", text, 40) for text in texts]
    np.testing.assert_allclose(scorer.raw(ids), raw, atol=1e-5)


def test_it_reads_conversations_through_its_own_template_and_no_text_becomes_a_control_token(ready: Workspace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ready.reward_base)
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    ids = ready_tokens(tokenizer, CHAT, "chat", "good<|im_start|>", 100)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nthe film<|im_end|><|im_end|>\n<|im_start|>assistant\ngood<|im_start|><|im_end|>\n"
    )
    assert sum(token in control for token in ids) == 4
    assert ready_tokens(tokenizer, CHAT, "chat", "good", 9) == encode_conversation(tokenizer, CHAT, "good")[-9:]
    tokenizer.chat_template = None
    spelt_out = ready_tokens(tokenizer, CHAT, "chat", "good", 100)
    assert tokenizer.decode(spelt_out) == "user: the film<|im_end|>\nassistant: good"
    assert not control & set(spelt_out)
    encoder = AutoTokenizer.from_pretrained(ready.judge_base, truncation_side="left")
    cls, sep = encoder.cls_token_id, encoder.sep_token_id
    words = ready_tokens(encoder, "the film is", "text", " wonderful and moving", 5)
    assert (words[0], words[-1], len(words)) == (cls, sep, 5)
    assert encoder.decode(words[1:-1]).endswith("moving")
    assert ready_tokens(encoder, "[SEP]", "text", "", 50).count(sep) == 1


def test_a_template_that_refuses_a_conversation_is_a_data_error(ready: Workspace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ready.reward_base)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(DataError, match="no users here"):
        ready_tokens(tokenizer, CHAT, "chat", "good", 100)


def test_ppo_maximises_the_ready_made_model(workspace: Workspace, params: Params) -> None:
    run_stage("ppo", params, workspace)
    run_stage("evaluate", params, workspace)
    samples = pd.read_parquet(workspace.samples)
    pairs = pd.read_parquet(workspace.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    human = oracle(workspace, list(dict.fromkeys([*held_out["chosen"], *held_out["rejected"]])))
    raw = oracle(workspace, (samples["prompt"] + samples["policy"]).tolist())
    np.testing.assert_allclose(samples["reward_policy"], (raw - human.mean()) / human.std(), atol=2e-3)


def test_a_ready_made_model_cannot_start_a_critic(workspace: Workspace, params: Params) -> None:
    params = changed(params, model={"critic": "separate"})
    with (
        pytest.raises(ConfigError, match=r"ppo\.model\.critic_start — there is no trained reward model"),
        ppo.open_run(params, workspace) as run,
    ):
        run.next_cycle()


def test_a_ready_made_model_reads_only_so_much_and_must_be_good(workspace: Workspace, params: Params) -> None:
    def with_reward(**section: Any) -> Params:
        return check_params(tiny._merge(json.loads(params.model_dump_json(by_alias=True)), {"reward_model": section}))

    with pytest.raises(ConfigError, match=r"300 is more than the 256 tokens .*|reward_model\.reward\.max_tokens"):
        run_stage("reward_model", with_reward(reward={"max_tokens": 300}), workspace)
    with pytest.raises(TrainingHealthError, match=r"choose another for ingest\.reward"):
        run_stage("reward_model", with_reward(min_accuracy=1.0), workspace)


def test_ppo_maximises_the_function_and_an_edit_of_it_is_another_run(workspace: Workspace, params: Params) -> None:
    function(workspace.own_data, "return [r.count('e') - 0.1 * len(p) for p, r in zip(prompts, responses)]")
    params = changed(params, reward={"function": "mine:score"}, cycles=1)
    run_stage("ppo", params, workspace)
    run_stage("evaluate", params, workspace)
    samples, pairs = pd.read_parquet(workspace.samples), pd.read_parquet(workspace.pairs)
    held_out = pairs[pairs.split == "reward_eval"]
    human = np.array([text.count("e") for text in dict.fromkeys([*held_out["chosen"], *held_out["rejected"]])])
    for who in ("policy", "reference"):
        raw = samples[who].str.count("e") - 0.1 * samples["prompt"].str.len()
        np.testing.assert_allclose(samples[f"reward_{who}"], (raw - human.mean()) / human.std(), atol=1e-5)
    before = fingerprint(params, workspace)
    function(workspace.own_data, "return [r.count('a') - 0.1 * len(p) for p, r in zip(prompts, responses)]")
    assert fingerprint(params, workspace) != before
    (workspace.own_data / "mine.py").unlink()
    with pytest.raises(ConfigError, match="there is no module mine"):
        ppo.open_run(params, workspace)


def test_a_function_is_given_a_conversation_as_the_data_has_it(workspace: Workspace, params: Params) -> None:
    prompts = pd.read_parquet(workspace.prompts)
    prompts.loc[0, ["prompt", "format"]] = CHAT, "chat"
    prompts.to_parquet(workspace.prompts)
    function(workspace.own_data, "return [len(p) if p.startswith('[{') else 0 for p in prompts]")
    params = changed(params, reward={"function": "mine:score"})
    tokenizer = AutoTokenizer.from_pretrained(workspace.base_model)
    reward = new_reward(params, workspace, tokenizer, None, load_trained(params, workspace, None))
    assert reward.read_prompt(encode_prompt(tokenizer, CHAT, "chat")) == CHAT
    assert reward.function([CHAT], ["x"]) == [len(CHAT)]


def test_a_worktree_finds_the_function(workspace: Workspace, params: Params) -> None:
    function(workspace.own_data, "return [float(len(r)) for r in responses]")
    place = worktree(workspace, load_params(workspace.params, ["ppo.reward.function='mine:score'"]), "function")
    assert source_file("mine:score", place.own_data) == place.own_data / "mine.py"
    assert load_params(place.params).ppo.reward.function == "mine:score"


def changed(params: Params, **section: Any) -> Params:
    return check_params(tiny._merge(json.loads(params.model_dump_json(by_alias=True)), {"ppo": section}))
