"""The ppo stage: continued with more cycles, begun anew, refused, stopped. Killed: test_faults_kill.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny
from safetensors.torch import load_file

from ppo_core.checkpoint import MANIFEST
from tasks import ppo
from tasks.errors import ConfigError, DataError, IntegrityError, ResumeMismatch, TrainingHealthError
from tasks.models.critic import load_critic
from tasks.params import Params, TargetParams, load_params
from tasks.run_folder import CRITIC, GO_ON, RunFolder
from tasks.seals import check_inputs
from tasks.stages import run_stage
from tasks.workspace import Workspace


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose ppo stage may begin."""
    workspace = tiny.tiny_workspace(tmp_path_factory.mktemp("ready") / "checkout")
    params = load_params(workspace.params)
    run_stage("ingest", params, workspace)
    run_stage("reward_model", params, workspace)
    return workspace


@pytest.fixture
def workspace(ready: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(ready.root, tmp_path / "checkout")
    return Workspace(tmp_path / "checkout")


@pytest.fixture
def params(workspace: Workspace) -> Params:
    return load_params(workspace.params)


def with_ppo(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"ppo": params.ppo.model_copy(update=changes)})


def records(workspace: Workspace) -> list[dict[str, float]]:
    """What the cycles recorded, without what the clock says."""
    files = sorted((workspace.work / "ppo").glob("*/cycle_*/record.json"))
    return [{k: v for k, v in json.loads(f.read_text()).items() if not k.startswith("time/")} for f in files]


def weights(workspace: Workspace) -> bytes:
    return (workspace.policy / "model.safetensors").read_bytes()


def test_more_cycles_continue_and_fewer_need_no_training(workspace: Workspace, params: Params):
    first = ppo.run(params, workspace).metrics
    one = (workspace.work / "ppo" / first["fingerprint"] / "cycle_001" / MANIFEST).stat().st_mtime_ns
    more = ppo.run(with_ppo(params, cycles=3), workspace).metrics
    assert (more["fingerprint"], more["mlflow_run_id"]) == (first["fingerprint"], first["mlflow_run_id"])
    assert (more["cycles"], more["result_cycle"], more["stopped_by"]) == (3, 3, "cycles")
    assert (workspace.work / "ppo" / first["fingerprint"] / "cycle_001" / MANIFEST).stat().st_mtime_ns == one
    assert pd.read_csv(workspace.cycles_csv)["cycle"].tolist() == [1, 2, 3]
    with ppo.open_run(with_ppo(params, cycles=1), workspace) as run:
        assert run.stopped == "cycles"
        assert run.finish().metrics["result_cycle"] == 1


@pytest.mark.fault("22: parameters changed before a resume", expected="a new run; the old one is kept")
def test_another_learning_rate_is_another_run(workspace: Workspace, params: Params):
    first = ppo.run(params, workspace).metrics["fingerprint"]
    update = params.ppo.update.model_copy(update={"learning_rate": 5e-4})
    second = ppo.run(with_ppo(params, update=update), workspace).metrics["fingerprint"]
    assert second != first
    assert len(list((workspace.work / "ppo" / first).glob("cycle_*"))) == 2  # the old one is kept


@pytest.mark.fault("22: libraries or machine changed before a resume", expected="exit 5, each old -> new")
def test_another_environment_is_refused_with_the_list(
    workspace: Workspace, params: Params, monkeypatch: pytest.MonkeyPatch
):
    metrics = ppo.run(params, workspace).metrics
    path = workspace.work / "ppo" / metrics["fingerprint"] / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0", "threads": 64}))
    with pytest.raises(ResumeMismatch, match=r"threads 64 -> .*torch 1\.0 -> "):
        ppo.open_run(params, workspace)
    monkeypatch.setenv(GO_ON, "1")
    with ppo.open_run(params, workspace) as run:
        assert run.stopped == "cycles"


@pytest.mark.fault("9: a flipped byte in the weights of a cycle", expected="exit 4 at the next start, file named")
def test_a_flipped_byte_in_a_checkpoint_is_noticed(workspace: Workspace, params: Params):
    metrics = ppo.run(params, workspace).metrics
    path = workspace.work / "ppo" / metrics["fingerprint"] / "cycle_002" / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="cycle_002"):
        ppo.open_run(params, workspace)


def test_the_budget_stops_and_the_result_is_within_it(workspace: Workspace, params: Params):
    fast = params.ppo.update.model_copy(update={"learning_rate": 0.02})
    params = with_ppo(params, update=fast)
    ppo.run(params, workspace)
    first, second = (r["dev/kl"] for r in records(workspace))
    assert first < second
    metrics = ppo.run(with_ppo(params, cycles=9, kl_budget=(first + second) / 2), workspace).metrics
    assert (metrics["stopped_by"], metrics["cycles"], metrics["result_cycle"]) == ("kl_budget", 2, 1)
    with pytest.raises(TrainingHealthError, match="no cycle stayed within"):
        ppo.run(with_ppo(params, cycles=9, kl_budget=first / 2), workspace)


def test_the_target_stops(workspace: Workspace, params: Params):
    target = TargetParams(metric="judge_win_rate", threshold=0.0, patience=1)
    metrics = ppo.run(with_ppo(params, target=target), workspace).metrics
    assert (metrics["stopped_by"], metrics["cycles"]) == ("target", 1)


def test_the_result_is_that_of_the_limits_whatever_was_trained_before(workspace: Workspace, params: Params):
    ppo.run(params, workspace)  # two cycles
    target = TargetParams(metric="judge_win_rate", threshold=0.0, patience=1)
    metrics = ppo.run(with_ppo(params, target=target, cycles=5), workspace).metrics
    assert (metrics["stopped_by"], metrics["cycles"], metrics["result_cycle"]) == ("target", 1, 1)


@pytest.mark.fault("9: a damaged state", expected="exit 4, what to delete named, and that helps")
def test_a_damaged_state_says_what_to_delete_and_that_helps(workspace: Workspace, params: Params):
    folder = workspace.runs / ppo.run(params, workspace).metrics["fingerprint"]
    weights_before = weights(workspace)
    (folder / "state_002" / "plain.json").write_text("{}")
    with (
        pytest.raises(IntegrityError, match="delete state_002 and cycle_002"),
        ppo.open_run(with_ppo(params, cycles=3), workspace) as run,
    ):
        run.next_cycle()
    shutil.rmtree(folder / "state_002")
    shutil.rmtree(folder / "cycle_002")
    ppo.run(params, workspace)
    assert weights(workspace) == weights_before


@pytest.mark.fault("11: a cycle is missing in the middle", expected="exit 4, named")
def test_a_missing_cycle_in_the_middle_is_named(workspace: Workspace, params: Params):
    folder = workspace.runs / ppo.run(params, workspace).metrics["fingerprint"]
    shutil.rmtree(folder / "cycle_001")
    with pytest.raises(IntegrityError, match="cycle_001 is missing, but cycle_002"):
        ppo.open_run(params, workspace)


def test_prompt_and_response_must_fit_the_context(workspace: Workspace, params: Params):
    sampling = params.ppo.sampling.model_copy(update={"max_new_tokens": 250})
    with (
        pytest.raises(ConfigError, match="exceed the model's context of 256"),
        ppo.open_run(with_ppo(params, sampling=sampling), workspace) as run,
    ):
        run.next_cycle()


def test_the_critic_of_the_result_lies_beside_its_policy(workspace: Workspace, params: Params):
    metrics = ppo.run(params, workspace).metrics
    cycle_2 = (workspace.critic / CRITIC).read_bytes()
    fewer = with_ppo(params, cycles=1)
    ppo.run(fewer, workspace)  # trains nothing, the result is another
    found = load_critic(workspace)
    folder = RunFolder(workspace.runs / metrics["fingerprint"])
    assert (workspace.critic / CRITIC).read_bytes() == folder.critic(1)[0].read_bytes() != cycle_2
    assert (found.cycle, found.kl_coef) == (1, params.ppo.reward.kl_coef)
    check_inputs("evaluate", workspace)
    # Killed between the two: the policy is that of one cycle, the critic that of another.
    with ppo.open_run(params, workspace) as run:
        run._write_policy(run.folder.weights(2))
    with pytest.raises(IntegrityError, match=r"models/critic — belongs to another policy.*run the ppo stage again"):
        load_critic(workspace)
    ppo.run(params, workspace)
    assert load_critic(workspace).cycle == 2
    (workspace.critic / CRITIC).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"models/critic/critic\.safetensors"):
        check_inputs("evaluate", workspace)
    shutil.rmtree(workspace.critic)
    with pytest.raises(DataError, match=r"models/critic — is missing.*run the ppo stage again"):
        load_critic(workspace)


@pytest.mark.parametrize("trainable", ["full", "top_layers"])
def test_a_critic_of_its_own(workspace: Workspace, params: Params, trainable: str):
    model = params.ppo.model.model_copy(update={"trainable": trainable, "critic": "separate"})
    assert ppo.run(with_ppo(params, model=model, cycles=1), workspace).metrics["cycles"] == 1


def test_the_policy_is_the_base_with_the_trained_weights(workspace: Workspace, params: Params):
    metrics = ppo.run(params, workspace).metrics
    trained = load_file(workspace.work / "ppo" / metrics["fingerprint"] / "cycle_002" / "policy.safetensors")
    policy, base = (load_file(folder / "model.safetensors") for folder in (workspace.policy, workspace.base_model))
    for name, tensor in policy.items():
        assert tensor.equal(trained[name] if name in trained else base[name].to(tensor.dtype)), name
    assert os.access(workspace.policy / "tokenizer.json", os.R_OK)
