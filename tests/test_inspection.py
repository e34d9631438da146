"""What the inspector says of tokens, against plain transformers, the definition of GAE, and what must add up."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from stores import new_store
from transformers import AutoModelForCausalLM

from ppo_core.tokens import encode_prompt
from tasks.errors import ConfigError, DataError
from tasks.inspector import command, inspection
from tasks.inspector.inspection import Completion, Inspection, Prompt
from tasks.models.preference_models import load_tokenizer
from tasks.params import Params, load_params
from tasks.run_folder import CRITIC
from tasks.stages import run_stage
from tasks.workspace import Workspace

GAMMA, LAM = 0.9, 0.8
PPO = {
    "advantages": {"gamma": GAMMA, "lam": LAM},
    "sampling": {"max_new_tokens": 9, "temperature": 0.7},
    "reward": {"kl_coef": 0.2, "kl_target": 0.5, "kl_horizon": 40, "score_clip": 0.3, "missing_eos_penalty": 0.1},
    "update": {"learning_rate": 2.0e-2, "critic_learning_rate": 2.0e-2},
}
CHAT = json.dumps([{"role": "user", "content": "the film"}])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a policy and its critic; read only."""
    workspace = new_store(tiny.tiny_workspace(tmp_path_factory.mktemp("inspected") / "checkout", {"ppo": PPO}))
    for stage in ("ingest", "reward_model", "ppo"):
        run_stage(stage, load_params(workspace.params), workspace)
    return workspace


@pytest.fixture(scope="module")
def params(trained: Workspace) -> Params:
    return load_params(trained.params)


@pytest.fixture(scope="module")
def inspected(trained: Workspace, params: Params) -> list[Inspection]:
    prompts = [*inspection.drawn_prompts(params, trained, "dev", 2), Prompt.of(CHAT)]
    return inspection.inspect(params, trained, prompts, 4)


def every(inspected: list[Inspection]) -> list[tuple[Prompt, Completion]]:
    return [(each.prompt, completion) for each in inspected for completion in each.completions]


def column(completion: Completion, name: str) -> np.ndarray:
    return np.array([getattr(token, name) for token in completion.tokens])


def test_networks_say_what_plain_transformers_say(trained: Workspace, inspected: list[Inspection]) -> None:
    tokenizer = load_tokenizer(trained.base_model)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (trained.policy, trained.base_model)
    )
    head = load_file(trained.critic / CRITIC)
    for prompt, completion in every(inspected):
        start = encode_prompt(tokenizer, *prompt)
        ids = torch.tensor([[*start, *(token.id for token in completion.tokens)]])
        places = torch.arange(len(start) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            laws = [(model(ids).logits[0, places] / 0.7).log_softmax(-1) for model in (policy, reference)]
            hidden = policy.get_decoder()(ids).last_hidden_state[0, places]
        picked = [law.gather(1, ids[0, places + 1].unsqueeze(1)).squeeze(1).numpy() for law in laws]
        values = hidden @ head["value_head.linear.weight"][0] + head["value_head.linear.bias"]
        np.testing.assert_allclose(column(completion, "logprob"), picked[0], atol=1e-4)
        np.testing.assert_allclose(column(completion, "ref_logprob"), picked[1], atol=1e-4)
        np.testing.assert_allclose(column(completion, "kl"), picked[0] - picked[1], atol=2e-4)
        np.testing.assert_allclose(column(completion, "entropy"), -(laws[0].exp() * laws[0]).sum(-1), atol=1e-4)
        np.testing.assert_allclose(column(completion, "value"), values, atol=1e-4)
        assert np.abs(column(completion, "value")).min() > 1e-4, "it has learnt"


def test_rewards_add_up_to_the_score_less_penalties_and_kl(trained: Workspace, inspected: list[Inspection]) -> None:
    folder = next((trained.work / "ppo").glob("*/state_002"))
    kl_coef = json.loads((folder / "plain.json").read_text())["kl"]["coef"]
    assert {each.kl_coef for each in inspected} == {kl_coef}
    assert kl_coef != 0.2, "it is adaptive"
    for _, completion in every(inspected):
        score = np.clip(completion.score - 0.1 * (not completion.ended), -0.3, 0.3)
        rewards, kl = column(completion, "reward"), column(completion, "kl")
        assert completion.kl == pytest.approx(kl.sum(), abs=1e-5)
        assert rewards.sum() == pytest.approx(score - kl_coef * completion.kl, abs=1e-5)
        np.testing.assert_allclose(rewards[:-1], -kl_coef * kl[:-1], atol=1e-6)
        last = completion.tokens[-1]
        assert completion.ended == (last.control == "<|im_end|>") == (len(completion.tokens) < 9 or last.text == "")


def test_advantages_are_those_of_the_definition(inspected: list[Inspection]) -> None:
    advantages, whitened = [], []
    for _, completion in every(inspected):
        rewards, values = column(completion, "reward"), column(completion, "value")
        deltas = rewards + GAMMA * np.append(values[1:], 0) - values
        n = len(deltas)
        expected = [sum((GAMMA * LAM) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(column(completion, "advantage"), expected, atol=1e-5)
        np.testing.assert_allclose(column(completion, "target"), expected + values, atol=1e-5)
        advantages += expected
        whitened += column(completion, "update_advantage").tolist()
    np.testing.assert_allclose(whitened, (advantages - np.mean(advantages)) / np.std(advantages), atol=1e-3)


def test_texts_are_those_of_the_tokens(trained: Workspace, inspected: list[Inspection]) -> None:
    tokenizer = load_tokenizer(trained.base_model)
    for _, completion in every(inspected):
        ids = [token.id for token in completion.tokens]
        assert "".join(token.text for token in completion.tokens) == tokenizer.decode(ids, skip_special_tokens=True)
        for token in completion.tokens:
            assert (token.control is not None) == (token.id in tokenizer.all_special_ids)
    assert len({tuple(t.id for t in c.tokens) for _, c in every(inspected)}) > 6, "each is drawn anew"


def test_a_prompt_is_answered_alike_alone_and_after_the_cycle_of_the_result(
    trained: Workspace, params: Params, inspected: list[Inspection]
) -> None:
    (alone,) = inspection.inspect(params, trained, [inspected[1].prompt], 2)
    (after,) = inspection.inspect(params, trained, [inspected[1].prompt], 2, cycle=2)
    assert alone == after
    for few, many in zip(alone.completions, inspected[1].completions, strict=False):
        assert [token.id for token in few.tokens] == [token.id for token in many.tokens]
        np.testing.assert_allclose(column(few, "advantage"), column(many, "advantage"), atol=1e-5)


def test_the_reference_has_no_kl_and_an_untrained_critic_expects_nothing(trained: Workspace, params: Params) -> None:
    (reference,) = inspection.inspect(params, trained, [Prompt.of("the film")], 2, cycle=0)
    (first,) = inspection.inspect(params, trained, [Prompt.of("the film")], 2, cycle=1)
    assert (reference.cycle, first.cycle) == (0, 1)
    for completion in reference.completions:
        assert not column(completion, "kl").any()
        assert not column(completion, "value").any()
    assert column(first.completions[0], "value").any()


def test_a_function_scores_prompts_that_the_data_do_not_have(trained: Workspace, params: Params) -> None:
    (trained.own_data / "mine.py").write_text("def score(prompts, responses):\n    return [len(p) for p in prompts]\n")
    reward = params.ppo.reward.model_copy(update={"function": "mine:score"})
    params = params.model_copy(update={"ppo": params.ppo.model_copy(update={"reward": reward})})
    short, long = inspection.inspect(params, trained, [Prompt.of("odd"), Prompt.of("odd" * 9)], 1)
    assert short.completions[0].score < long.completions[0].score


@pytest.mark.parametrize(
    ("prompt", "cycle", "message"),
    [
        ("a", 7, "--cycle — no cycle 7 — there are 0 .* and 1 to 2"),
        ("a", -1, "no cycle -1"),
        ("long " * 250, None, "exceed the model's context of 256"),
        ('[{"role": "judge", "content": ""}]', None, "prompt .*role 'judge' is none of"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    trained: Workspace, params: Params, prompt: str, cycle: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        inspection.inspect(params, trained, [Prompt.of(prompt)], 1, cycle)


def test_a_cycle_whose_critic_was_not_kept_is_not_offered(trained: Workspace, params: Params, tmp_path: Path) -> None:
    place = Workspace(shutil.copytree(trained.root, tmp_path / "checkout"))
    (critic,) = place.runs.glob(f"*/cycle_*1/{CRITIC}")
    critic.unlink()
    with pytest.raises(ConfigError, match=r"no cycle 1 — there are 0 .* and 2 to 2"):
        inspection.inspect(params, place, [Prompt.of("a")], 1, 1)


def test_prompts_as_a_person_types_them() -> None:
    assert Prompt.of(CHAT).format == "chat"
    for text in ("", "a film", "[]", "[1]", '{"role": "user"}', '[{"role": "user"}]', "[a]"):
        assert Prompt.of(text) == (text, "text")


def test_the_command_writes_a_page(trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    out = tmp_path / "new" / "page.html"
    asked = ["--completions", "2", "--out", str(out)]
    assert command.command(parser.parse_args(["--rows", "3,0", *asked]), trained) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text(encoding="utf-8")
    rows = inspection.split_prompts(trained, "dev")
    assert page.index(rows[3].text) < page.index(rows[0].text)
    with pytest.raises(ConfigError, match="--rows — no row 99 — dev has rows 0 to 7"):
        command.command(parser.parse_args(["--rows", "99", *asked]), trained)
    for wrong in (["--split", "test"], ["--completions", "0"], ["--rows", "1,x"], ["--rows", "-1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    assert "'1,x' is no list of rows such as 0,5,9" in capsys.readouterr().err
    with pytest.raises(DataError, match="models/policy — is missing — train one first"):
        command.command(parser.parse_args(["--params", str(trained.params)]), Workspace(tmp_path))
