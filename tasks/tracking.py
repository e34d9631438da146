"""The record of an alignment in MLflow: one run, whatever process continues it.

Everything goes through a client with an explicit run id. MLflow's fluent functions keep the active run in thread-local
state: a Prefect task in another thread would open a stray run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from ppo_core.digests import sha256
from tasks.addresses import public_uri
from tasks.errors import Locked, ResourceError, ServiceError, TrainingHealthError
from tasks.params import Params, dump_params
from tasks.processes import HOST, PID, is_alive, is_here, process_tags
from tasks.registration import registry
from tasks.run_tags import cut, flatten, gap_tags, git_tags, numbers
from tasks.workspace import Workspace
from tasks.workspace_lock import in_turn

EXPERIMENT = "alignment"
FINGERPRINT = "proximal.fingerprint"
CHANGED = "changed."
"""Prefix of the tags that hold the present value of a parameter which has changed: MLflow keeps the first for good."""
PROBE_SECONDS = 5.0

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logging.getLogger(__name__)


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the main checkout: the same from every directory and worktree."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.main_root / 'mlflow.db'}"


def connect(workspace: Workspace) -> MlflowClient:
    """A client of the store. Raises ServiceError where a server does not answer, before MLflow begins to retry."""
    uri = tracking_uri(workspace)
    check_answers(workspace)
    # Otherwise every migration of a new database and every start of a sampler is told.
    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def check_answers(workspace: Workspace) -> None:
    """Raises ServiceError, within seconds, where the store is on a server that does not answer."""
    _probe(tracking_uri(workspace))


def store_exists(workspace: Workspace) -> bool:
    """False where the store is a file that is not there: asking MLflow would make an empty one."""
    uri = tracking_uri(workspace)
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def record_exists(workspace: Workspace, run_id: str, model_version: int | None = None) -> bool:
    """Whether the run is there and not deleted, and so is the registered version that was made from it."""
    if not store_exists(workspace):
        return False
    client = connect(workspace)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.lifecycle_stage != "active":
        return False
    versions = client.search_model_versions(f"run_id = '{run_id}'") if model_version is not None else []
    return model_version is None or model_version in (int(version.version) for version in versions)


class Tracker:
    """The run of one alignment, open for writing. Made by `Tracker.open`; a context manager that closes it."""

    def __init__(self, client: MlflowClient, run: Run, workspace: Workspace, params: Params) -> None:
        self.client = client
        self.run = run
        self._workspace = workspace
        self._params = params
        self._unrecorded: list[tuple[int, dict[str, float], Path]] = []
        self._base: dict[str, Any] | None = None
        self._monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=True, tracking_uri=client.tracking_uri)

    @classmethod
    def open(cls, workspace: Workspace, fingerprint: str, params: Params) -> Tracker:
        """Continue the run of this fingerprint, or begin it.

        Runs whose process died are closed as KILLED on the way. Raises ServiceError where MLflow does not answer, and
        Locked where another living process of this machine has the run open.
        """
        client = connect(workspace)
        with service(client):
            experiment = _experiment(client, workspace)
            _close_abandoned(client, experiment)
            found = client.search_runs([experiment], f"tags.`{FINGERPRINT}` = '{fingerprint}'", max_results=1)
            tags = {FINGERPRINT: fingerprint} | process_tags()  # from its first moment it is known whose it is
            name = f"alignment-{fingerprint[:8]}"
            run = found[0] if found else client.create_run(experiment, tags=tags, run_name=name)
            _check_free(run)
            tracker = cls(client, run, workspace, params)
            tracker._begin()
        return tracker

    @property
    def run_id(self) -> str:
        return str(self.run.info.run_id)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
            return
        try:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")
        except (ServiceError, ResourceError) as unavailable:
            log.warning("%s", unavailable)  # the error that ended the block is the one to report

    def log_cycle(self, record: Mapping[str, float], weights: Path) -> None:
        """Record a finished cycle: its model with the trained `weights`, and its figures at step = `record["cycle"]`.

        What is recorded already is not recorded twice. A server that has gone does not end training: the cycle waits
        for the next call, and `close` raises if it still could not be recorded. Raises TrainingHealthError for a figure
        that is not finite.
        """
        cycle = int(record["cycle"])
        figures = {key: float(value) for key, value in record.items() if key != "cycle"}
        _check_finite(figures, f"cycle {cycle}")
        self._unrecorded.append((cycle, figures, weights))
        self._catch_up()

    def log_stage(self, stage: str, metrics: Mapping[str, Any], report: Path | None = None) -> None:
        """Record what a stage found: its numbers as STAGE.x, its report folder as artifacts."""
        figures = dict(numbers(metrics, stage))
        _check_finite(figures, stage)
        now = int(time.time() * 1000)
        with service(self.client):
            known = self.client.get_run(self.run_id).data.metrics
            fresh = [Metric(key, value, now, 0) for key, value in figures.items() if known.get(key) != value]
            tags = [RunTag(key, value) for key, value in gap_tags(stage, metrics).items()]
            self.client.log_batch(self.run_id, metrics=fresh, tags=tags)
            if report is not None and report.is_dir():
                self.client.log_artifacts(self.run_id, str(report), f"reports/{stage}")

    def close(self, status: Status) -> None:
        """End the run. Raises ServiceError where cycles could not be recorded for want of a server."""
        self._monitor.finish()
        self._catch_up()
        if not self._unrecorded:
            with service(self.client):
                self.client.set_terminated(self.run_id, status)
            return
        cycles = ", ".join(str(cycle) for cycle, _, _ in self._unrecorded)
        raise ServiceError(
            f"MLflow went away: cycles not recorded: {cycles}",
            public_uri(self.client.tracking_uri),
            "nothing is lost; run the stage again when it answers, and they are recorded then",
        )

    def _begin(self) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        known = self.client.get_run(self.run_id).data
        given = {key: cut(str(value)) for key, value in flatten(dump_params(self._params))}
        changed = {key: given.get(key, "not set") for key, value in known.params.items() if given.get(key) != value}
        for key in (k for k in known.tags if k.startswith(CHANGED) and k.removeprefix(CHANGED) not in changed):
            self.client.delete_tag(self.run_id, key)
        # Code that matters is part of the fingerprint: the commit at which the run began goes on being true.
        code = {key: value for key, value in git_tags(self._workspace.root).items() if key not in known.tags}
        tags = code | process_tags() | {CHANGED + key: value for key, value in changed.items()}
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        fresh = [Param(key, value) for key, value in given.items() if key not in known.params]
        for start in range(0, len(fresh), 100):  # the most that MLflow takes at once
            self.client.log_batch(self.run_id, params=fresh[start : start + 100])
        self.client.log_dict(self.run_id, dump_params(self._params), "params.yaml")
        with in_turn(self._workspace.registry_lock):  # MLflow fails where two add the same data set at once
            self.client.log_inputs(self.run_id, list(_datasets(self._workspace)))
        self._monitor.start()

    def _catch_up(self) -> None:
        while self._unrecorded:
            try:
                _probe(self.client.tracking_uri)  # a server that is away costs one question, not MLflow's retries
                with service(self.client):
                    self._record_cycle(*self._unrecorded[0])
            except ServiceError as error:
                log.warning("%s; the cycle is recorded when it is back", error)
                return
            del self._unrecorded[0]

    def _record_cycle(self, cycle: int, figures: dict[str, float], weights: Path) -> None:
        if self._base is None:
            self._base = registry.describe_base(self._workspace)
        model = registry.log_cycle_model(self.client, self.run, cycle, weights, self._base, self._params.ppo.sampling)
        # What is there stays: a cycle that was repeated is the same but for what the clock says.
        known = {metric.key for metric in self.client.get_logged_model(model.model_id).metrics or ()}
        fresh = {key: value for key, value in figures.items() if key not in known}
        at = model.creation_timestamp  # MLflow drops an equal point, so that recording again changes nothing
        metrics = [Metric(k, v, at, cycle, model_id=model.model_id, run_id=self.run_id) for k, v in fresh.items()]
        self.client.log_batch(self.run_id, metrics=metrics)


def _probe(uri: str) -> None:
    if not uri.startswith(("http://", "https://")):
        return
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS).raise_for_status()
    except requests.RequestException as error:
        raise ServiceError(
            f"MLflow does not answer ({type(error).__name__})",
            public_uri(uri),
            "start the server, or unset MLFLOW_TRACKING_URI",
        ) from error


@contextmanager
def service(client: MlflowClient) -> Iterator[None]:
    """Turns what MLflow raises into ServiceError where its server has gone, ResourceError where its disk is full."""
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        _probe(client.tracking_uri)
        if "disk is full" in str(error):  # SQLite's words
            raise ResourceError("the disk is full", public_uri(client.tracking_uri), "make room") from error
        raise


def _experiment(client: MlflowClient, workspace: Workspace) -> str:
    if (found := client.get_experiment_by_name(EXPERIMENT)) is not None:
        return str(found.experiment_id)
    local = tracking_uri(workspace).startswith("sqlite:")
    place = (workspace.main_root / "mlartifacts").as_uri() if local else None  # a server has a place of its own
    try:
        created: str = client.create_experiment(EXPERIMENT, artifact_location=place)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment(client, workspace)  # another run created it meanwhile
    return created


def _check_free(run: Run) -> None:
    tags = run.data.tags
    if run.info.status == "RUNNING" and is_here(tags) and tags[PID] != str(os.getpid()) and is_alive(tags):
        raise Locked(
            f"is being written by process {tags[PID]} on {tags[HOST]}", f"MLflow run {run.info.run_id}", "wait for it"
        )


def _close_abandoned(client: MlflowClient, experiment: str) -> None:
    """Runs of this machine that a dead process left open."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if is_here(run.data.tags) and not is_alive(run.data.tags):
            client.set_terminated(run.info.run_id, "KILLED")
            log.info("run %s was left open by a process that died; marked KILLED", run.info.run_id)


def _datasets(workspace: Workspace) -> Iterator[DatasetInput]:
    """The sources and the tables made from them. MLflow holds 36 characters of a digest; `source` has it whole."""
    if not workspace.provenance.is_file():
        return
    for entry in json.loads(workspace.provenance.read_text(encoding="utf-8")):
        profile = json.dumps({"rows": entry.get("rows"), "licence": entry.get("licence")})
        yield _dataset(entry["name"], entry["sha256"], entry, profile, "source")
    for table in (workspace.pairs, workspace.prompts):
        digest = sha256(table)
        source = {"file": str(table.relative_to(workspace.root)), "sha256": digest}
        yield _dataset(table.name, digest, source, "{}", "training")


def _dataset(name: str, digest: str, source: Mapping[str, Any], profile: str, context: str) -> DatasetInput:
    dataset = Dataset(name, digest[:36], "local", json.dumps(source), profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _check_finite(figures: Mapping[str, float], where: str) -> None:
    """MLflow would store an infinity as 1.8e308 and draw it."""
    bad = [f"{key} = {value}" for key, value in figures.items() if not math.isfinite(value)]
    if bad:
        raise TrainingHealthError(f"not finite: {', '.join(bad)}", where)
