"""The flow `align`: every stage a task run, every PPO cycle one too; DVC says what can be skipped.

Stages hand over files, never values: Prefect stores no results and pickles nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import State, Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed
from prefect.transactions import CommitMode, transaction
from pydantic import Field

from flows import artifacts, gpu, lifecycle, logs
from flows.review import NAME as REVIEW
from flows.review import REVIEW_HOURS, wait_for_decision, waiting_candidate
from tasks import environment
from tasks.errors import ServiceError
from tasks.params import Params, dump_params, load_params
from tasks.profiles import profile_under
from tasks.seals import check_inputs
from tasks.stages import STAGES, StageResult, machine_errors, run_stage, write_metrics
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from tasks.ppo import PPORun

NAME = "align"
COMPUTING = ("reward_model", "ppo", "evaluate")
"""Stages that hold a GPU slot. ppo holds one over all its cycles, because its models stay in memory between them."""

log = logging.getLogger(__name__)


@flow(name=NAME, persist_result=False, on_crashed=[lifecycle.record_cancellation])
def align(
    params: Params | None = None,
    workspace: str | None = None,
    force: bool = False,
    profile: str | None = None,
    review: bool = False,
    review_hours: Annotated[float, Field(gt=0, le=8760)] = REVIEW_HOURS,
) -> str | State:
    """Align a language model to human preferences: data, reward model, PPO, evaluation, registration.

    Args:
        params: Parameters of this run. Left empty, those of params.yaml as it is when the run starts. Where they
            differ from it, the run takes place in a git worktree of its own, so that what is recorded is what ran.
        workspace: Checkout to work in. Left empty, the one that this code belongs to.
        force: Run every stage, also those that DVC knows to be up to date.
        profile: Name of a file in profiles/. Its parameters take the place of those of params.yaml; what was changed in
            params comes over them. The run takes place in work/worktrees/NAME.
        review: Where the new version becomes the candidate, ask a person to approve or reject it, and wait.
        review_hours: How long to wait, a year at most. After that it goes on being the candidate.

    Returns the folder in which the results lie (str).
    """
    environment.prepare()
    try:
        with logs.forwarded(), lifecycle.own_run():
            lifecycle.close_abandoned(NAME, REVIEW)
            gpu.ensure_limit()
            here = Workspace(Path(workspace)) if workspace else Workspace.here()
            if profile:
                params = profile_under(params or load_params(here.params), profile, here)
            where = place(params, here, profile)
            _run_stages(where, force)
            if review and (candidate := waiting_candidate(where)):
                decided = wait_for_decision(*candidate, str(where.root), review_hours)
                return Completed(message=str(decided), data=str(where.root))
            return str(where.root)
    except Exception as error:
        return lifecycle.failed(error)


def _run_stages(workspace: Workspace, force: bool) -> None:
    # Imported here: DVC takes a while, and a worker that only looks at the flow needs none of it.
    from tasks.tracking import check_answers
    from tasks.versioning import source_digests
    from tasks.workspace_lock import workspace_lock

    with workspace_lock(workspace):
        check_answers(workspace)  # told now, not after the reward model was trained
        began, params = source_digests(workspace), load_params(workspace.params)
        if params.ppo.sampler == "vllm":
            from tasks.models.vllm_sampler import VllmServer  # imports torch

            VllmServer(params.ppo.sampling)  # likewise
        for stage in STAGES:
            stage_task = run_stage_task.with_options(name=stage, task_run_name=stage)
            stage_task(stage, params, workspace, force, began)


def place(params: Params | None, workspace: Workspace, profile: str | None = None) -> Workspace:
    """The workspace itself for its own parameters; a worktree of it for others, which a profile gives its name."""
    if params is None or (profile is None and params == load_params(workspace.params)):
        return workspace
    from tasks.versioning import worktree

    # The same parameters lead to the same place, so that a run that was interrupted continues there.
    name = profile or hashlib.sha256(json.dumps(dump_params(params), sort_keys=True).encode()).hexdigest()[:12]
    found = worktree(workspace, params, name)
    why = f"profile {profile}" if profile else f"the parameters differ from {workspace.params.name}"
    log.info("%s, so the run takes place in %s", why, found.root)
    return found


def _can_help(task: Task[..., Any], task_run: TaskRun, state: State) -> bool:
    """A service may answer the next time; data, parameters and training stay as they are."""
    return isinstance(state.data, ServiceError)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[2, 6],
    retry_condition_fn=_can_help,
)
def run_stage_task(stage: str, params: Params, workspace: Workspace, force: bool, began: dict[str, str]) -> State:
    """One stage: skipped if up to date, else run, checked and committed to DVC.

    `began` are the digests of parameters and code that this run has read; a change of them meanwhile is refused.
    """
    from tasks.versioning import stage_guard, up_to_date

    if not force and up_to_date(stage, workspace):
        log.info("%s: up to date", stage)
        return Completed(name="Skipped", message="up to date")
    started = time.time()
    try:
        with gpu.gpu_slot() if stage in COMPUTING else nullcontext(), stage_guard(stage, workspace, began):
            result = _ppo(params, workspace) if stage == "ppo" else run_stage(stage, params, workspace)
    finally:
        # A report says, too, why a stage failed.
        artifacts.publish_report(stage, workspace, since=started)
    if stage == "ppo":  # after the commit: a link that fails must not cost the training
        artifacts.publish_run_link(result.metrics["mlflow_run_id"], workspace)
    return Completed(message=result.summary)


def _ppo(params: Params, workspace: Workspace) -> StageResult:
    """The ppo stage cycle by cycle. After an error it starts again from the last finished cycle, not from memory."""
    from tasks.ppo import open_run

    check_inputs("ppo", workspace)
    with machine_errors("ppo", workspace), open_run(params, workspace) as run:
        live = artifacts.LiveCycles(params.ppo.cycles)
        live.show(run.records, run.stopped)
        while run.stopped is None:
            # Otherwise Prefect calls finished cycles "rolled back" when a later one fails.
            with transaction(commit_mode=CommitMode.EAGER):
                ppo_cycle(run, len(run.records) + 1)
            live.show(run.records, run.stopped)
        result = run.finish()
    write_metrics("ppo", result, workspace)
    return result


@task(name="ppo cycle", task_run_name="ppo cycle {cycle}", cache_policy=NO_CACHE, persist_result=False)
def ppo_cycle(run: PPORun, cycle: int) -> State:
    """One cycle. Never retried by itself: what is in memory after an error is not what was checkpointed."""
    record = run.next_cycle()
    figures = ("judge_win_rate", "reward_gain", "judge_gain", "kl")
    return Completed(message=", ".join(f"{name} {record[f'dev/{name}']:.3f}" for name in figures))
