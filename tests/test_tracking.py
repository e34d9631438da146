"""The record in MLflow, on SQLite: runs that are continued, cycles recorded once, their models generating text."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from stores import new_store
from tiny import tiny_params, tiny_policy

from tasks import tracking
from tasks.cycle_model import load_policy
from tasks.errors import Locked, ServiceError, TrainingHealthError
from tasks.params import Params, check_params
from tasks.run_tags import HOST, PID, STARTED
from tasks.tracking import Tracker, record_exists
from tasks.workspace import Workspace

RECORD = {"cycle": 1, "dev/judge_win_rate": 0.625, "train/kl": 2.5}


@pytest.fixture
def home(tmp_path: Path, policy_folder: Path) -> Workspace:
    """A folder with a database and a base model."""
    workspace = new_store(Workspace(tmp_path))
    workspace.base_model.parent.mkdir()
    shutil.copytree(policy_folder, workspace.base_model)
    return workspace


@pytest.fixture
def params() -> Params:
    return check_params(tiny_params())


def changed(**ppo: Any) -> Params:
    plain = tiny_params()
    plain["ppo"] |= ppo
    return check_params(plain)


def trained_weights(workspace: Workspace, path: Path) -> Path:
    """The last layer of the base, moved: what a cycle trains."""
    tensors = load_file(workspace.base_model / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    last = {
        name: tensor + torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.3.")
    }
    save_file(last, path)
    return path


def history(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, key)]


def test_the_store_does_not_depend_on_the_working_directory(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with Tracker.open(home, "f" * 64, params) as tracker:
        run = tracker.client.get_run(tracker.run_id)
    assert tracking.tracking_uri(home) == f"sqlite:///{home.root}/mlflow.db"
    assert run.info.artifact_uri.startswith((home.root / "mlartifacts").as_uri())
    assert list(elsewhere.iterdir()) == []


def test_a_run_is_continued_by_its_fingerprint(home: Workspace, params: Params) -> None:
    with Tracker.open(home, "a" * 64, params) as first:
        assert first.client.get_run(first.run_id).info.status == "RUNNING"
    assert first.client.get_run(first.run_id).info.status == "FINISHED"
    with Tracker.open(home, "a" * 64, changed(cycles=7)) as again, Tracker.open(home, "b" * 64, params) as other:
        run = again.client.get_run(again.run_id)
        assert run.info.status == "RUNNING"
        assert run.data.params["ppo.cycles"] == "2"
        assert run.data.tags["changed.ppo.cycles"] == "7"
        assert again.run_id == first.run_id != other.run_id
    with Tracker.open(home, "a" * 64, params) as back:
        assert not any(tag.startswith("changed.") for tag in back.client.get_run(back.run_id).data.tags)
    assert mlflow.active_run() is None


def test_params_are_flat_and_cut_with_a_note(home: Workspace) -> None:
    plain = tiny_params()
    plain["ingest"]["data"][0]["licence"] = "x" * 7000
    with Tracker.open(home, "a" * 64, check_params(plain)) as tracker:
        pass
    with Tracker.open(home, "a" * 64, check_params(plain)) as tracker:
        data = tracker.client.get_run(tracker.run_id).data
    assert data.params["ppo.update.learning_rate"] == "0.001"
    assert data.params["ingest.data.0.format"] == "ratings"
    assert len(data.params["ingest.data.0.licence"]) == 6000
    assert data.params["ingest.data.0.licence"].endswith("(cut; whole in the artifact params.yaml)")
    assert "changed.ingest.data.0.licence" not in data.tags


def test_data_and_code_are_recorded(workspace: Workspace, params: Params) -> None:
    new_store(workspace)
    workspace.canonical.mkdir(parents=True)
    source = {"name": "ratings", "source": "file:r.jsonl", "sha256": "c" * 64, "licence": "MIT", "rows": 240}
    workspace.provenance.write_text(json.dumps([source]), encoding="utf-8")
    workspace.pairs.write_bytes(b"pairs")
    workspace.prompts.write_bytes(b"prompts")
    for _ in range(2):
        with Tracker.open(workspace, "a" * 64, params) as tracker:
            run = tracker.client.get_run(tracker.run_id)
    found = {each.dataset.name: each.dataset for each in run.inputs.dataset_inputs}
    assert sorted(found) == ["pairs.parquet", "prompts.parquet", "ratings"]
    assert len(run.inputs.dataset_inputs) == 3
    assert found["ratings"].digest == "c" * 36
    assert json.loads(found["ratings"].source)["sha256"] == "c" * 64
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace.root, capture_output=True, text=True, check=True
    )
    assert run.data.tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert run.data.tags["proximal.git.dirty"] == "false"


def test_a_cycle_is_recorded_once(home: Workspace, params: Params, tmp_path: Path) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    for _ in range(2):
        with Tracker.open(home, "a" * 64, params) as tracker:
            tracker.log_cycle(RECORD, weights)
            tracker.log_cycle({**RECORD, "cycle": 2, "dev/judge_win_rate": 0.75}, weights)
    assert history(tracker, "dev/judge_win_rate") == [(1, 0.625), (2, 0.75)]
    assert history(tracker, "train/kl") == [(1, 2.5), (2, 2.5)]
    ranked = tracker.client.search_logged_models(
        [tracker.run.info.experiment_id],
        "metrics.`dev/judge_win_rate` > 0.5",
        order_by=[{"field_name": "metrics.dev/judge_win_rate", "ascending": False}],
    )
    assert [model.name for model in ranked] == ["policy-cycle-2", "policy-cycle-1"]
    assert len(tracker.client.get_run(tracker.run_id).outputs.model_outputs) == 2


@pytest.mark.fault("13: a cycle half recorded in MLflow", expected="completed, one point a step")
@pytest.mark.parametrize("broken", ["log_model_artifacts", "finalize_logged_model", "log_outputs", "log_batch"])
def test_a_half_recorded_cycle_is_completed(
    home: Workspace, params: Params, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    tracker = Tracker.open(home, "a" * 64, params)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, broken, dies)
        with pytest.raises(KeyboardInterrupt):
            tracker.log_cycle(RECORD, weights)
    with Tracker.open(home, "a" * 64, params) as again:
        again.log_cycle(RECORD, weights)
    assert history(again, "dev/judge_win_rate") == [(1, 0.625)]
    models = again.client.search_logged_models([again.run.info.experiment_id])
    assert [(m.name, str(m.status.value), len(m.metrics)) for m in models] == [("policy-cycle-1", "READY", 2)]


def test_a_cycle_can_be_recorded_from_another_thread(home: Workspace, params: Params, tmp_path: Path) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    with Tracker.open(home, "a" * 64, params) as tracker:
        thread = threading.Thread(target=tracker.log_cycle, args=(RECORD, weights))
        thread.start()
        thread.join()
        runs = tracker.client.search_runs([tracker.run.info.experiment_id])
    assert history(tracker, "train/kl") == [(1, 2.5)]
    assert [run.info.run_id for run in runs] == [tracker.run_id]


@pytest.mark.fault("15: a figure for MLflow that is not finite", expected="exit 7, nothing of it recorded")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_refused(home: Workspace, params: Params, value: float, tmp_path: Path) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    with pytest.raises(TrainingHealthError, match=r"cycle 3.*train/kl"):
        tracker.log_cycle({"cycle": 3, "train/kl": value, "dev/kl": 1.0}, tmp_path / "unread")
    assert history(tracker, "dev/kl") == []
    tracker.close("FAILED")
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"


def test_stage_figures_are_flat_and_recorded_once(home: Workspace, params: Params, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>seen</p>", encoding="utf-8")
    metrics = {"judge": {"accuracy": 0.85, "n": 10, "by_margin": [0.5, 0.75]}, "name": "x", "gap": None, "ok": True}
    with Tracker.open(home, "a" * 64, params) as tracker:
        tracker.log_stage("reward_model", metrics, report)
        tracker.log_stage("reward_model", metrics, report)
    assert history(tracker, "reward_model.judge.accuracy") == [(0, 0.85)]
    assert history(tracker, "reward_model.judge.by_margin.1") == [(0, 0.75)]
    assert history(tracker, "reward_model.ok") == [(0, 1.0)]
    assert [a.path for a in tracker.client.list_artifacts(tracker.run_id, "reports/reward_model")] == [
        "reports/reward_model/report.html"
    ]


@pytest.mark.fault("a run in MLflow left RUNNING by a dead process", expected="KILLED when the next one opens")
def test_a_run_left_open_by_a_dead_process_is_closed(home: Workspace, params: Params) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    tracker.client.set_tag(tracker.run_id, PID, str(process.pid))
    with Tracker.open(home, "b" * 64, params) as other:
        assert other.client.get_run(tracker.run_id).info.status == "KILLED"


def test_a_later_process_of_the_same_number_is_another(home: Workspace, params: Params) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    began = float(tracker.client.get_run(tracker.run_id).data.tags[STARTED])
    tracker.client.set_tag(tracker.run_id, STARTED, str(began - 3600))
    with Tracker.open(home, "b" * 64, params) as other:
        assert other.client.get_run(tracker.run_id).info.status == "KILLED"


@pytest.mark.fault("21: an MLflow run that another process writes", expected="exit 6, process named")
def test_a_run_that_a_living_process_writes_is_locked(home: Workspace, params: Params) -> None:
    import psutil

    tracker = Tracker.open(home, "a" * 64, params)
    parent = psutil.Process().parent()
    tracker.client.set_tag(tracker.run_id, PID, str(parent.pid))
    tracker.client.set_tag(tracker.run_id, STARTED, str(parent.create_time()))
    with pytest.raises(Locked, match=f"process {parent.pid}"):
        Tracker.open(home, "a" * 64, params)
    # Another machine's process cannot be asked; the lock of the workspace is what guards there.
    tracker.client.set_tag(tracker.run_id, HOST, "elsewhere")
    with Tracker.open(home, "b" * 64, params) as other:
        assert other.client.get_run(tracker.run_id).info.status == "RUNNING"
    Tracker.open(home, "a" * 64, params).close("FINISHED")


def test_errors_and_interrupts_end_the_run_accordingly(home: Workspace, params: Params) -> None:
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), Tracker.open(home, "a" * 64, params) as tracker:
            raise error
        assert tracker.client.get_run(tracker.run_id).info.status == status


def test_a_dead_service_is_reported_at_once(home: Workspace, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        Tracker.open(home, "a" * 64, params)
    with pytest.raises(ServiceError):
        record_exists(home, "0" * 32)


@pytest.mark.fault("13: MLflow does not take a cycle", expected="kept, recorded with the next one, once")
def test_a_service_that_goes_away_does_not_end_training(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained_weights(home, tmp_path / "policy.safetensors")
    tracker = Tracker.open(home, "a" * 64, params)

    def gone(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    def unreachable(_: str) -> None:
        raise ServiceError("MLflow does not answer")

    with monkeypatch.context() as outage:
        outage.setattr(MlflowClient, "log_batch", gone)
        outage.setattr(tracking, "_probe", unreachable)
        tracker.log_cycle(RECORD, weights)
        with pytest.raises(ServiceError, match="cycles not recorded: 1"):
            tracker.close("FINISHED")
    tracker.log_cycle({**RECORD, "cycle": 2}, weights)
    tracker.close("FINISHED")
    assert history(tracker, "train/kl") == [(1, 2.5), (2, 2.5)]


def test_other_errors_of_mlflow_are_not_taken_for_an_outage(
    home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open(home, "a" * 64, params)
    with pytest.raises(MlflowException, match="Invalid value"):
        tracker.log_cycle({"cycle": 1, "no(such)name": 1.0}, trained_weights(home, tmp_path / "policy.safetensors"))


def test_record_exists(home: Workspace, params: Params, tmp_path: Path) -> None:
    with Tracker.open(home, "a" * 64, params) as tracker:
        pass
    assert record_exists(home, tracker.run_id)
    assert not record_exists(home, tracker.run_id, model_version=1)
    assert not record_exists(home, "0" * 32)
    tracker.client.delete_run(tracker.run_id)
    assert not record_exists(home, tracker.run_id)
    nowhere = Workspace(tmp_path / "nowhere")
    nowhere.root.mkdir()
    assert not record_exists(nowhere, tracker.run_id)
    assert list(nowhere.root.iterdir()) == []


@pytest.fixture
def cycle_uri(home: Workspace, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recorded cycle, as `mlflow.pyfunc.load_model` names it."""
    with Tracker.open(home, "a" * 64, params) as tracker:
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
        load_policy(policy_folder, strange)
    lacking = shutil.copytree(policy_folder, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MlflowException, match=r"missing.*layers\.2"):
        load_policy(lacking)
