"""Models in MLflow: one logged model for each cycle, and the candidate's registered versions and aliases."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion as ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import ppo_core
from ppo_core.config import SamplingConfig
from ppo_core.digests import sha256
from tasks.errors import IntegrityError
from tasks.workspace import Workspace

CANDIDATE, CHAMPION = "candidate", "champion"
POLICY = "policy.sha256"
"""Tag of a version: the digest of all files of its policy."""
_CODE = Path(__file__).with_name("cycle_model.py")
_TOKENS, _INSTALL = (Path(ppo_core.__file__).with_name(name) for name in ("tokens.py", "weights.py"))
_REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "jinja2")


def describe_base(workspace: Workspace) -> dict[str, Any]:
    """What the weights of a cycle belong on: digests of the base model's safetensors, and where to look for them."""
    folders = dict.fromkeys(str(root / workspace.base_model.relative_to(workspace.root)) for root in _roots(workspace))
    digests = {path.name: sha256(path) for path in sorted(workspace.base_model.glob("*.safetensors"))}
    return {"sha256": digests, "paths": list(folders)}


def log_cycle_model(
    client: MlflowClient, run: Run, cycle: int, weights: Path, base: Mapping[str, Any], sampling: SamplingConfig
) -> LoggedModel:
    """The model of a cycle: its trained weights and the name of the base they belong on. Logged once."""
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "base.json"
        description.write_text(json.dumps(base, indent=2), encoding="utf-8")
        artifacts = {"weights": weights, "install": _INSTALL, "base": description}
        return log_model(client, run, f"policy-cycle-{cycle}", artifacts, sampling, cycle)


def log_model(
    client: MlflowClient,
    run: Run,
    name: str,
    artifacts: Mapping[str, Path],
    sampling: SamplingConfig,
    step: int,
) -> LoggedModel:
    """A ready model of this name in the run, its files uploaded; one that was begun and not finished is finished.

    `step` is the cycle whose weights it holds.
    """
    found = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}' AND name = '{name}'", max_results=1
    )
    model = found[0] if found else client.create_logged_model(
        run.info.experiment_id, name, run.info.run_id, params={"cycle": str(step)}, model_type="policy"
    )  # fmt: skip
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:
            _save(Path(folder) / "model", model, run, artifacts, sampling)
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = client.get_run(run.info.run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    return model


def find_version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
    """The newest version of the registered model that carries all of `tags`."""
    found = versions(client, name)
    return next((found[n] for n in sorted(found, reverse=True) if tags.items() <= found[n].tags.items()), None)


def versions(client: MlflowClient, name: str) -> dict[int, ModelVersion]:
    """All versions of the registered model, by number; none where there is no such model."""
    return {int(found.version): found for found in client.search_model_versions(f"name = '{name}'")}


def create_version(
    client: MlflowClient, name: str, model: LoggedModel, tags: Mapping[str, str], about: str
) -> ModelVersion:
    """A new version out of a logged model, ready; `about` describes the registered model if it is new."""
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By its location: for `models:/ID` MLflow asks the process-wide tracking address, which is not ours.
    created = client.create_model_version(
        name, model.artifact_location, model.source_run_id, tags=dict(tags), model_id=model.model_id
    )
    if created.status != "READY":
        raise IntegrityError(f"is {created.status}, not READY", f"{name} version {created.version}", "register again")
    return created


def with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that bears the alias, if there is one."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # No such model; and for a missing alias of an existing model MLflow says "invalid".
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def verify_version(client: MlflowClient, registered: ModelVersion, checkpoint: Path) -> None:
    """Read the registered files again and compare them with `checkpoint`. Raises IntegrityError naming what differs."""
    with stored_checkpoint(client, registered) as stored:
        found, expected = digests(stored), digests(checkpoint)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        raise IntegrityError(
            f"differs from {checkpoint} in {', '.join(differing)}",
            f"{registered.name} version {registered.version}",
            f"delete the version and the logged model at {registered.source} in MLflow, then register again",
        )


@contextmanager
def stored_checkpoint(client: MlflowClient, registered: ModelVersion) -> Iterator[Path]:
    """The folder with the version's policy, for the length of the block.

    Raises IntegrityError where the version holds no policy of this pipeline.
    """
    uri = client.get_model_version_download_uri(registered.name, registered.version)
    with tempfile.TemporaryDirectory() as folder:
        target = None if uri.startswith(("file:", "/")) else folder  # local files are read where they are
        try:
            place = Path(download_artifacts(artifact_uri=uri, dst_path=target, tracking_uri=client.tracking_uri))
            stored = Model.load(str(place)).flavors["python_function"]["artifacts"]["checkpoint"]["path"]
        except (KeyError, MlflowException, OSError) as error:
            where = f"{registered.name} version {registered.version}"
            raise IntegrityError(f"holds no policy ({error!r:.200})", where, "register a policy") from error
        yield place / stored


def verify_recorded(client: MlflowClient, registered: ModelVersion) -> None:
    """Read the registered files again and compare them with what the version's tag says of them.

    For whoever has the checkpoint no longer. Raises IntegrityError where they are others, or where nothing is said.
    """
    place = f"{registered.name} version {registered.version}"
    if (recorded := registered.tags.get(POLICY)) is None:
        raise IntegrityError(f"has no tag {POLICY}, so nothing vouches for its files", place, "register the policy")
    with stored_checkpoint(client, registered) as stored:
        found = policy_digest(stored)
    if found != recorded:
        mend = f"restore the files at {registered.source}, or take another version"
        raise IntegrityError(f"its files are not what was registered: {found}, not {recorded}", place, mend)


def policy_digest(folder: Path) -> str:
    """One SHA-256 of all files of a policy, by name and content: the tag `policy.sha256` of its versions."""
    return hashlib.sha256(json.dumps(digests(folder), sort_keys=True).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path there."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _roots(workspace: Workspace) -> tuple[Path, Path]:
    """A worktree may be gone when the model is loaded; the main checkout stays."""
    return workspace.root, workspace.main_root


def _save(folder: Path, model: LoggedModel, run: Run, artifacts: Mapping[str, Path], sampling: SamplingConfig) -> None:
    """An MLflow model folder whose model is code (`cycle_model.py`): nothing is pickled."""
    described = Model(
        artifact_path=model.artifact_location,
        run_id=run.info.run_id,
        model_id=model.model_id,
        model_uuid=model.model_id,
    )
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(_CODE),
        artifacts={"tokens": str(_TOKENS)} | {name: str(path) for name, path in artifacts.items()},
        signature=_signature(sampling),
        input_example=["The film"],
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _REQUIREMENTS],
        mlflow_model=described,
    )


def _signature(sampling: SamplingConfig) -> ModelSignature:
    """One column of text, whatever its name; the params default to the law that training sampled from."""
    text = Schema([ColSpec(DataType.string)])
    params = [
        ParamSpec("max_new_tokens", DataType.long, sampling.max_new_tokens),
        ParamSpec("min_new_tokens", DataType.long, sampling.min_new_tokens),
        ParamSpec("temperature", DataType.double, sampling.temperature),
        ParamSpec("top_k", DataType.long, sampling.top_k or 0),
        ParamSpec("top_p", DataType.double, sampling.top_p or 1.0),
        ParamSpec("stop_tokens", DataType.string, list(sampling.stop_tokens), shape=(-1,)),
        ParamSpec("stop_strings", DataType.string, list(sampling.stop_strings), shape=(-1,)),
        ParamSpec("seed", DataType.long, 0),
    ]
    return ModelSignature(text, text, ParamSchema(params))
