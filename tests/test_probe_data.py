"""Data of the probes: every kind of file, what is refused, and that nothing of it is trained on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny

from tasks.data.canonical import Lengths
from tasks.data.probe_data import read_probes
from tasks.data.splits import asked, held_by
from tasks.data_params import IngestParams
from tasks.errors import ConfigError, DataError, IntegrityError
from tasks.models.preference_models import load_tokenizer
from tasks.params import check_params, load_params
from tasks.seals import seal
from tasks.stages import run_stage
from tasks.workspace import Workspace

LOCK, TEA = "How do I pick a lock?", "How do I make tea?"
LABELS = {"prompt": "objective", "response": "reply", "scores": ["human_score", "human_score_2"]}


@pytest.fixture
def own(tmp_path, policy_folder):
    """The user's folder, and what reads the probes that a section `ingest.probes` names there."""

    class Own:
        folder = tmp_path / "checkout" / "data" / "own"
        lengths = Lengths(load_tokenizer(policy_folder))

        def write(self, name: str, content: object) -> str:
            text = content if isinstance(content, str) else json.dumps(content)
            (self.folder / name).write_text(text, encoding="utf-8")
            return f"file:{name}"

        def read(self, *, ingest=None, seed=5, **probes):
            raw = tiny.tiny_params()["ingest"] | {"probes": probes} | (ingest or {})
            scratch = tmp_path / "scratch"
            scratch.mkdir(exist_ok=True)
            workspace = Workspace(self.folder.parents[1])
            return read_probes(IngestParams.model_validate(raw), workspace, scratch, self.lengths, seed)

    Own.folder.mkdir(parents=True)
    return Own()


def rows(table: pd.DataFrame) -> list[dict]:
    return table.drop(columns="item").to_dict("records")


def chat(said: str) -> str:
    return json.dumps([{"role": "user", "content": said}])


# What is read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{LOCK}\n\n  {TEA} \n"),
        ("a.json", [{"prompt": LOCK}, {"prompt": TEA}]),
        ("a.jsonl", "".join(json.dumps({"prompt": text, "intents": []}) + "\n" for text in (LOCK, TEA))),
        ("a.csv", f'# a comment\nprompt\n"{LOCK}"\n{TEA}\n'),
    ],
)
def test_prompts_are_what_a_person_asks_the_assistant(own, name, content):
    found = own.read(red_team=[{"source": own.write(name, content), "comment": "#"}])
    expected = [{"format": "chat", "prompt": chat(LOCK)}, {"format": "chat", "prompt": chat(TEA)}]
    assert rows(found.tables["red_team"]) == expected
    assert found.counts == {"red_team": 2}


def test_a_prompt_may_be_a_text_to_continue_or_a_conversation(own):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEA}]
    source = own.write("a.jsonl", json.dumps({"q": LOCK}) + "\n" + json.dumps({"q": turns}))
    found = own.read(prompts={"mine": [{"source": source, "columns": {"prompt": "q"}, "chat": False}]})
    assert rows(found.tables["mine"]) == [
        {"format": "text", "prompt": LOCK}, {"format": "chat", "prompt": json.dumps(turns)},
    ]  # fmt: skip


def test_labels_are_the_mean_of_their_raters_and_several_files_are_one_source(own):
    (own.folder / "evals").mkdir()
    for name, scores in (("one.csv", ["0.25", "0.75"]), ("two.csv", ["1", ""])):
        with (own.folder / "evals" / name).open("w", newline="") as file:
            file.write("# version=1.0,,\n")
            table = csv.writer(file)
            table.writerows(
                [["objective", "reply", "human_score", "human_score_2"], [LOCK, f"Never, {name}.", *scores]]
            )
    source = {"source": "file:evals", "file": "*.csv", "comment": "#", "columns": LABELS}
    found = own.read(harm_labels=[source])
    assert found.tables["harm_labels"][["response", "label"]].values.tolist() == [
        ["Never, one.csv.", 0.5], ["Never, two.csv.", 1.0],
    ]  # fmt: skip


def test_choices_of_ones_own_and_of_big_bench(own):
    mine = own.write("mine.jsonl", json.dumps({"prompt": TEA, "right": "With water.", "wrong": ["With oil.", "No."]}))
    task = {"canary": "canary 26b5", "examples": [{"input": LOCK, "target_scores": {"Ask a locksmith.": 1, "Axe.": 0}}]}
    (own.folder / "hhh" / "harmless").mkdir(parents=True)
    own.write("hhh/harmless/task.json", task)
    found = own.read(
        truthful=[{"source": mine}], hhh=[{"source": "file:hhh", "file": "*/task.json", "format": "bigbench"}]
    )
    answers = found.tables["truthful"]
    assert list(zip(answers["text"], answers["correct"], strict=True)) == [
        ("With water.", True), ("With oil.", False), ("No.", False),
    ]  # fmt: skip
    assert answers["item"].nunique() == 1
    assert rows(found.tables["hhh"]) == [
        {"format": "chat", "prompt": chat(LOCK), "text": text, "correct": correct, "subset": "harmless",
         "canary": "canary 26b5"}
        for text, correct in (("Ask a locksmith.", True), ("Axe.", False))
    ]  # fmt: skip


def test_statements_that_belong_together_share_an_item(own):
    source = own.write("a.json", [{"text": "Ice is cold.", "false": "Ice is hot."}, {"text": "Grass grows."}])
    found = own.read(statements=[{"source": source, "columns": {"right": "text", "wrong": "false"}}])
    table = found.tables["statements"]
    assert table["text"].tolist() == ["Ice is cold.", "Ice is hot.", "Grass grows."]
    assert table["correct"].tolist() == [True, False, True]
    assert table["item"][0] == table["item"][1] != table["item"][2]


def test_texts_come_from_rows_lines_or_beside_their_ratings(own):
    rated = own.write("rated.txt", "1_1\t0.4\tOn Monday it rained.\n1_2\t-1\tOn Tuesday too.\n")
    lines = own.write("lines.txt", "On Wednesday, sun.\n")
    found = own.read(plain_text=[{"source": rated, "format": "rated_texts", "max_rows": 1}, {"source": lines}])
    assert found.tables["plain_text"]["text"].tolist() == ["On Monday it rained.", "On Wednesday, sun."]


def test_what_says_the_same_stands_there_once(own):
    source = own.write("a.json", [{"prompt": LOCK}, {"prompt": f" {LOCK.upper()}"}, {"prompt": TEA}])
    assert own.read(benign=[{"source": source}]).counts == {"benign": 2}
    labelled = [{"prompt": LOCK, "response": "No.", "score": score} for score in (0.0, 1.0)]
    found = own.read(harm_labels=[{"source": own.write("b.json", labelled)}])
    assert found.tables["harm_labels"]["label"].tolist() == [0.0]


def test_a_share_of_the_labels_keeps_whole_prompts_and_leaves_the_others_to_training(own):
    labelled = [{"prompt": f"Question {i % 40}?", "response": f"Answer {i}.", "score": 0.5} for i in range(120)]
    source = {"source": own.write("a.json", labelled)}
    table = own.read(harm_labels=[source], harm_label_share=0.4).tables["harm_labels"]
    assert len(table) == 48
    assert set(table["prompt"].value_counts()) == {3}
    other = own.read(harm_labels=[source], harm_label_share=0.4, seed=6).tables["harm_labels"]
    assert set(other["prompt"]) != set(table["prompt"])


# What is refused


def test_every_bad_row_of_every_probe_is_reported_in_one_pass(own):
    own.write("red.jsonl", f'{{"prompt": "{LOCK}"}}\n{{"prompt": ""}}\n{{"prompt": 3}}\nno json\n')
    own.write("labels.json", [{"prompt": LOCK, "response": "No.", "score": 7}, {"prompt": LOCK, "response": "No."}])
    own.write("hhh.json", {"examples": [{"input": TEA, "target_scores": {"a": 1, "b": 1}}, "text"]})
    own.write("facts.json", [{"right": " "}, {}])
    own.write("plain.jsonl", json.dumps({"text": "word " * 40}))
    with pytest.raises(DataError) as caught:
        own.read(
            red_team=[{"source": "file:red.jsonl"}], harm_labels=[{"source": "file:labels.json"}],
            hhh=[{"source": "file:hhh.json", "format": "bigbench"}], statements=[{"source": "file:facts.json"}],
            plain_text=[{"source": "file:plain.jsonl"}], max_text_tokens=30,
        )  # fmt: skip
    where = [problem.where for problem in caught.value.problems]
    assert all(problem.mend for problem in caught.value.problems)
    places = [
        "red.jsonl:2:prompt", "red.jsonl:3:prompt", "red.jsonl:4", "labels.json:1:scores", "labels.json:2",
        "hhh.json:1", "hhh.json:2:examples", "facts.json:1:right", "facts.json:2", "plain.jsonl:1:text",
    ]  # fmt: skip
    assert [place for place in where if place.split(":")[1:]] == [f"data/own/{place}" for place in places]


def test_a_subset_that_no_metric_can_be_called_by_is_refused(own):
    comparison = {"prompt": TEA, "right": "With water.", "wrong": "With oil."}
    own.write("mine.json", [comparison | {"subset": "kind & fair"}, comparison | {"subset": "Ehrlich-1.0 ja"}])
    with pytest.raises(DataError, match=r"mine\.json:1:subset — .* — use letters, digits, spaces"):
        own.read(hhh=[{"source": "file:mine.json"}])
    task = {"examples": [{"input": LOCK, "target_scores": {"Ask a locksmith.": 1, "Axe.": 0}}]}
    (own.folder / "kind & fair").mkdir()
    own.write("kind & fair/task.json", task)
    with pytest.raises(DataError, match="has the subset 'kind & fair', which cannot name a figure"):
        own.read(hhh=[{"source": "file:kind & fair", "file": "task.json", "format": "bigbench"}])


def test_a_source_that_cannot_be_had_names_its_probe_and_the_way_out(own):
    with pytest.raises(DataError) as caught:
        own.read(red_team=[{"source": "file:gone.jsonl"}], benign=[{"source": own.write("a.txt", TEA)}])
    last = caught.value.problems[-1]
    assert last.where == "ingest.probes.red_team.0"
    assert "remove it: then its figures are reported as not measured" in last.mend


def test_bad_rows_may_be_dropped_and_are_counted(own):
    source = own.write("a.json", [{"prompt": LOCK}, {"prompt": "word " * 80}, {"prompt": ""}])
    found = own.read(red_team=[{"source": source, "bad_rows": "drop"}])
    assert (found.counts, found.left_out) == ({"red_team": 1}, 2)


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ({"red_teem": []}, "no such parameter"),
        ({"prompts": {"test": []}}, "test is the name of a probe or of a split"),
        ({"benign": [{"source": "file:a", "format": "bigbench"}]}, "the format bigbench is for hhh and truthful alone"),
        ({"benign": [{"source": "pypi:garak==0.17.1", "file": "a.txt"}]}, "needs `sha256`"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(probes, said):
    raw = tiny.tiny_params()
    raw["ingest"]["probes"] = probes
    with pytest.raises(ConfigError, match=said):
        check_params(raw)


def test_a_json_file_that_is_no_list_of_objects_is_refused(own):
    for content, said in (("[1, 2", "is not JSON"), ('{"prompt": "a"}', "is no JSON array")):
        with pytest.raises(DataError, match=said):
            own.read(red_team=[{"source": own.write("a.json", content)}])


# What is held back from training


@pytest.fixture
def with_probes(tmp_path, policy_folder, judge_folder):
    """A workspace after ingest, one of whose probes holds twenty of the texts that are there to train on."""
    workspace = Workspace(tmp_path / "probed")
    workspace.own_data.mkdir(parents=True)
    shutil.copytree(policy_folder, workspace.own_data / "policy")
    shutil.copytree(judge_folder, workspace.own_data / "judge")
    lines = tiny.ratings_file(workspace.own_data / "ratings.jsonl", 240).read_text().splitlines()
    probed = [json.loads(line)["text"].upper() for line in lines[:20]]
    (workspace.own_data / "plain.txt").write_text("\n".join(probed))
    raw = tiny.tiny_params()
    raw["ingest"]["probes"] = {"plain_text": [{"source": "file:plain.txt", "licence": "MIT"}]}
    params = check_params(raw)
    return workspace, params, run_stage("ingest", params, workspace).metrics


def test_ingest_leaves_out_of_training_what_the_probes_hold(with_probes):
    workspace, params, metrics = with_probes
    pairs, prompts = pd.read_parquet(workspace.pairs), pd.read_parquet(workspace.prompts)
    held = held_by({path.stem: pd.read_parquet(path) for path in workspace.probes.glob("*.parquet")})
    assert len(held) == 20
    trained = [*pairs["chosen"], *pairs["rejected"], *prompts["prompt"]]
    assert not held.keys() & {asked(text, "text") for text in trained}
    assert (metrics["probes"], metrics["left_to_the_probes"]) == ({"plain_text": 20}, 20)
    entry = next(e for e in json.loads(workspace.provenance.read_text()) if e["name"] == "probe plain_text")
    assert (entry["source"], entry["rows"], entry["licence"]) == ("file:plain.txt", 20, "MIT")
    run_stage("validate", params, workspace)

    # A leak made by hand is what validation is for; a table that is another than ingest wrote is not even read.
    table = workspace.probes / "plain_text.parquet"
    pd.DataFrame({"item": ["a"], "text": [pairs["chosen"][0]]}).to_parquet(table)
    with pytest.raises(IntegrityError, match=r"plain_text\.parquet"):
        run_stage("validate", params, workspace)
    seal(workspace.probes)
    with pytest.raises(DataError, match="no prompt or text is one that a probe holds"):
        run_stage("validate", params, workspace)


def test_what_a_prompt_asks_is_the_same_in_any_case_spacing_and_system_message():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " How do I pick\na LOCK?"}]
    assert asked(json.dumps(turns), "chat") == asked(LOCK, "text") == asked(chat(LOCK), "chat")
    two = [*turns, {"role": "assistant", "content": "Why?"}, {"role": "user", "content": "Why not?"}]
    assert asked(json.dumps(two), "chat") != asked(LOCK, "text")


def test_an_answer_of_a_probe_may_stand_in_training_data():
    table = pd.DataFrame(
        {"item": ["a"], "format": ["chat"], "prompt": [chat(LOCK)], "text": ["I cannot help with that."]}
    )
    assert held_by({"hhh": table}) == {asked(LOCK, "text"): "hhh"}


def test_the_shipped_parameters_name_probes_that_can_be_read():
    assert load_params(Path(__file__).resolve().parents[1] / "params.yaml").ingest.probes.named()["statements"]
