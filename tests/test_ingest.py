"""The ingest stage through its own command, on the tiny workspace and on data that breaks each of its rules."""

from __future__ import annotations

import json
import random
import shutil

import pandas as pd
import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_core.tokens import encode_prompt, encode_response
from tasks.__main__ import main
from tasks.data.canonical import opening
from tasks.data.sources import digest
from tasks.data.splits import normal
from tasks.data_params import PromptParams
from tasks.errors import DataError
from tasks.ingest import run
from tasks.params import check_params
from tasks.workspace import Workspace

SMALL = {"dev": 2, "test": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace after ingest, with its tables; read only."""
    workspace = tiny.tiny_workspace(tmp_path_factory.mktemp("ingest") / "checkout")
    assert main(["ingest", "--workspace", str(workspace.root)]) == 0
    return workspace, pd.read_parquet(workspace.pairs), pd.read_parquet(workspace.prompts)


@pytest.fixture
def bare(tmp_path, policy_folder, judge_folder):
    """A workspace of models and parameters alone; the test brings the data."""
    workspace = Workspace(tmp_path / "bare")
    workspace.own_data.mkdir(parents=True)
    shutil.copytree(policy_folder, workspace.own_data / "policy")
    shutil.copytree(judge_folder, workspace.own_data / "judge")
    return workspace


def ingest(workspace, rows, format="preferences", seed=5, **section):
    """Tables made of `rows`, written as JSONL into the user's folder."""
    (workspace.own_data / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = tiny.tiny_params() | {"seed": seed}
    raw["ingest"] |= {"data": [{"source": "file:own.jsonl", "format": format, **section.pop("data", {})}], **section}
    result = run(check_params(raw), workspace)
    return pd.read_parquet(workspace.pairs), pd.read_parquet(workspace.prompts), result.metrics


def pairs_of(n, **more):
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **more} for i in range(n)]


# The canonical data


def test_tables_have_the_agreed_columns_and_splits(made):
    _, pairs, prompts = made
    assert set(pairs) == {
        "pair_id", "format", "prompt", "chosen", "rejected", "margin", "target", "chosen_tokens", "rejected_tokens",
        "source", "reward", "group", "split",
    }  # fmt: skip
    assert set(prompts) == {"prompt_id", "format", "prompt", "tokens", "source", "group", "split"}
    assert set(pairs["split"]) == {"reward_train", "reward_eval", "judge_train", "judge_eval"}
    assert prompts["split"].value_counts()[["dev", "test"]].to_dict() == {"dev": 8, "test": 12}
    assert pairs["pair_id"].is_unique
    assert prompts["prompt_id"].is_unique


def test_ratings_become_margins_and_soft_labels(made):
    workspace, pairs, _ = made
    lines = (workspace.own_data / "ratings.jsonl").read_text().splitlines()
    ratings = {row["text"]: row["ratings"] for row in map(json.loads, lines)}
    for pair in pairs.itertuples():
        high, low = ratings[pair.chosen], ratings[pair.rejected]
        assert pair.margin == pytest.approx(sum(high) / 9 - sum(low) / 9)
        assert pair.margin >= 0.25
        assert pair.target == pytest.approx(sum((a > b) + (a == b) / 2 for a in high for b in low) / 81)


def test_no_text_is_in_two_splits_nor_behind_a_prompt(made):
    workspace, pairs, prompts = made
    of = {split: {*part["chosen"], *part["rejected"]} for split, part in pairs.groupby("split")}
    assert sum(map(len, of.values())) == len(set().union(*of.values()))
    used = set().union(*of.values())
    lines = (workspace.own_data / "ratings.jsonl").read_text().splitlines()
    unused = [row["text"] for row in map(json.loads, lines) if row["text"] not in used]
    for prompt in prompts["prompt"]:
        assert 3 <= len(prompt.split()) <= 4
        assert any(text.startswith(prompt) and text != prompt for text in unused)
    assert prompts["prompt"].map(normal).is_unique


def test_pairs_of_a_group_lie_together(made):
    _, pairs, _ = made
    assert (pairs["group"] != pairs["group"].shift()).sum() == pairs["group"].nunique()


def test_token_counts_are_those_of_the_policy(made):
    workspace, pairs, prompts = made
    tokenizer = AutoTokenizer.from_pretrained(workspace.base_model)
    pair = pairs.iloc[0]
    assert pair["chosen_tokens"] == 1 + len(encode_response(tokenizer, pair["chosen"]))
    prompt = prompts.iloc[0]
    assert prompt["tokens"] == len(encode_prompt(tokenizer, prompt["prompt"], "text"))


def test_models_are_copied_and_the_record_says_where_everything_is_from(made):
    workspace, _, _ = made
    AutoModelForCausalLM.from_pretrained(workspace.base_model)
    assert (workspace.judge_base / "model.safetensors").exists()
    records = {record["name"]: record for record in json.loads(workspace.provenance.read_text())}
    assert set(records) == {"policy", "judge", "data"}
    assert records["policy"]["sha256"] == digest(workspace.own_data / "policy")
    assert (records["data"]["rows"], records["data"]["licence"]) == (240, "MIT")
    metrics = json.loads(workspace.metrics("ingest").read_text())
    assert metrics["prompts"]["all"] == metrics["prompts"]["ppo"] + 20


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_splits(made, tmp_path):
    workspace, pairs, _ = made
    before = digest(workspace.canonical)
    raw = tiny.tiny_params()
    run(check_params(raw), workspace)
    assert digest(workspace.canonical) == before
    other = Workspace(tmp_path)
    shutil.copytree(workspace.own_data, other.own_data)
    run(check_params(raw | {"seed": 6}), other)
    assert set(pd.read_parquet(other.pairs)["pair_id"]) != set(pairs["pair_id"])


# Prompts of the data's own


def test_prompts_of_the_prompt_share_become_prompts_and_their_pairs_are_left_out(bare):
    pairs, prompts, _ = ingest(bare, pairs_of(60), splits=SMALL)
    assert set(prompts["prompt"]) <= {f"question {i}" for i in range(60)}
    assert len(pairs) + len(prompts) == 60
    assert set(pairs["prompt"]).isdisjoint(prompts["prompt"])


def test_what_hangs_together_through_a_prompt_or_a_text_stays_together(bare):
    rows = [
        {"prompt": f"Question {i // 3}", "chosen": f"good {i}", "rejected": f"bad {i}" if i % 2 else f"bad {i - 20}"}
        for i in range(120)
    ]
    pairs, prompts, _ = ingest(bare, rows, splits={"dev": 1, "test": 1})
    of = {split: {*part["prompt"], *part["chosen"], *part["rejected"]} for split, part in pairs.groupby("split")}
    of["prompts"] = set(prompts["prompt"])
    assert sum(map(len, of.values())) == len(set().union(*of.values()))


def test_conversations_that_open_alike_stay_together(bare):
    def row(i, turns):
        said = ["user", "assistant"] * turns + ["user"]
        begin = [
            {"role": role, "content": f"opening {i}" if not t else f"{i} {t} {turns}"} for t, role in enumerate(said)
        ]
        replies = [[*begin, {"role": "assistant", "content": f"{kind} {i} {turns}"}] for kind in ("good", "bad")]
        return dict(zip(("chosen", "rejected"), replies, strict=True))

    rows = [row(i, turns) for i in range(40) for turns in (0, 1)]
    pairs, prompts, _ = ingest(bare, rows, "messages", splits=SMALL | {"dev": 2, "test": 4})
    both = pd.concat([pairs[["prompt", "split"]], prompts[["prompt", "split"]]])
    both["opening"] = both["prompt"].map(lambda prompt: json.loads(prompt)[0]["content"])
    assert (both.groupby("opening")["split"].nunique() == 1).all()
    assert (both.groupby("opening")["prompt"].nunique() == 2).all()


def test_duplicates_are_dropped_and_counted_but_contradictions_are_kept(bare):
    rows = pairs_of(40)
    again = [{**rows[0], "chosen": "GOOD  0"}, rows[1]]
    reverse = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    pairs, _, metrics = ingest(bare, [*rows, *again, *reverse], splits=SMALL)
    assert metrics["duplicates_dropped"] == 2
    assert (pairs.groupby("prompt").size() == 2).all()


def test_a_rated_text_that_comes_twice_is_read_once(bare):
    rows = [{"text": f"a film of {i} words that is fine", "ratings": [i % 7, 1]} for i in range(60)]
    _, _, metrics = ingest(bare, [*rows, {**rows[0], "ratings": [0]}], "ratings", splits=SMALL)
    assert (metrics["rows"], metrics["duplicates_dropped"]) == (61, 1)


def test_an_opening_leaves_something_to_continue():
    draws = [random.Random(seed) for seed in range(40)]
    ask = PromptParams(min_words=2, max_words=4)
    assert {opening("a  b c", ask, draw) for draw in draws} == {"a  b"}
    assert {opening("a  b c d e f", ask, draw) for draw in draws} == {"a  b", "a  b c", "a  b c d"}
    assert opening("a b", ask, draws[0]) is None


def test_a_prompt_that_is_too_long_is_named(bare):
    rows = [*pairs_of(50), {**pairs_of(1)[0], "prompt": "why " * 40}]
    with pytest.raises(DataError, match=r"own.jsonl:51:prompt — is \d+ tokens long, allowed are 20"):
        ingest(bare, rows, splits=SMALL, max_prompt_tokens=20)


def test_bad_rows_may_be_left_out_and_are_counted(bare):
    rows = [*pairs_of(50), {"prompt": "p", "chosen": "", "rejected": "b"}, {**pairs_of(1)[0], "prompt": "long " * 200}]
    _, _, metrics = ingest(bare, rows, splits=SMALL, data={"bad_rows": "drop"})
    assert metrics["bad_rows_dropped"] == 2


def test_max_rows_reads_the_first_rows_only(bare):
    _, _, metrics = ingest(bare, [*pairs_of(50), {"broken": 1}], splits=SMALL, data={"max_rows": 50})
    assert metrics["rows"] == 50


# What goes wrong


def state(workspace):
    return {path: digest(path) for path in (workspace.canonical, workspace.base_model, workspace.judge_base)}


@pytest.fixture
def used(made, tmp_path):
    """A copy of a workspace after ingest, for a test to break."""
    shutil.copytree(made[0].root, tmp_path / "used", ignore=shutil.ignore_patterns(".git", ".dvc"))
    return Workspace(tmp_path / "used")


def fails(workspace, capsys, code, *settings):
    """The message of an ingest that ends with `code` and leaves everything as it was."""
    before = state(workspace)
    argv = ["ingest", "--workspace", str(workspace.root)]
    assert main([*argv, *(part for setting in settings for part in ("--set", setting))]) == code
    assert state(workspace) == before
    assert not list(workspace.work.glob("ingest-*"))
    return capsys.readouterr().err


def test_bad_rows_end_with_file_row_field_and_mend_and_leave_what_was_there(used, capsys):
    with (used.own_data / "ratings.jsonl").open("a") as file:
        file.write('{"text": "", "ratings": [1]}\n{"text": "fine", "ratings": ["1"]}\n')
        file.write(json.dumps({"text": "long " * 400, "ratings": [1]}) + "\n")
    message = fails(used, capsys, 3)
    assert "data/own/ratings.jsonl:241:text — is empty — mend the row or leave it out" in message
    assert "data/own/ratings.jsonl:242:ratings.0 — Input should be a valid number — write a number" in message
    assert "data/own/ratings.jsonl:243:text — is with its prompt" in message
    assert "3 bad rows" in message


def test_too_few_texts_say_how_many_are_needed(used, capsys):
    assert "needed are {'test': 500, 'dev': 8}" in fails(used, capsys, 3, "ingest.splits.test=500")
    assert "no pairs for reward_eval" in fails(used, capsys, 3, "ingest.splits.held_out=0")


def test_impossible_parameters_are_config_errors(used, capsys):
    assert "min_words 9" in fails(used, capsys, 2, "ingest.prompts.min_words=9")
    assert "leave no texts for the prompts" in fails(used, capsys, 2, "ingest.splits.reward=0.8")
    assert "the 256 tokens that the policy reads" in fails(used, capsys, 2, "ingest.max_text_tokens=300")


def test_a_missing_source_is_a_data_error(used, capsys):
    (used.own_data / "ratings.jsonl").unlink()
    assert "data/own/ratings.jsonl — there is no such file" in fails(used, capsys, 3)


def test_pickled_weights_are_refused(used, capsys):
    weights = used.own_data / "policy" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "holds no weights as .safetensors" in fails(used, capsys, 3)


def test_damaged_or_incomplete_weights_are_refused(used, capsys):
    weights = used.own_data / "policy" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in fails(used, capsys, 3)
    save_file({name: t for name, t in tensors.items() if "layers.3.mlp.up" not in name}, weights, {"format": "pt"})
    assert "lacks weights: model.layers.3.mlp.up_proj.weight" in fails(used, capsys, 3)


def test_what_cannot_be_a_policy_is_refused(used, capsys):
    assert "lacks weights: cls.predictions" in fails(used, capsys, 3, "ingest.policy.source=file:judge")
    assert "neither a .gguf file nor a folder" in fails(used, capsys, 3, "ingest.policy.source=file:ratings.jsonl")
    (used.own_data / "policy" / "config.json").write_text('{"model_type": "unheard of"}')
    assert "does not load as a language model" in fails(used, capsys, 3)
