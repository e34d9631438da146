"""What is versioned and what is up to date. The only module that talks to DVC.

A flow runs a stage itself and tells DVC afterwards. `dvc commit` believes what it is told, also where inputs changed in
the meantime, and remembers it in its run cache: `stage_guard` sees to it that it is told nothing untrue.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from dvc.dependency.param import MissingParamsError, ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo

from tasks.errors import ConfigError, DataError, IntegrityError
from tasks.params import Params, dump_params, load_params
from tasks.run_tags import flatten
from tasks.workspace import SMALL_RESULTS, Workspace
from tasks.workspace_lock import workspace_lock

CODE = ("ppo_core", "tasks", "flows")

Digests = dict[str, str]
"""Parameters (`params.yaml:KEY`) and files or folders (by path), each with what tells whether it changed."""


def up_to_date(stage: str, workspace: Workspace) -> bool:
    """Whether parameters, inputs and outputs are those of the stage's last run, and its record in MLflow is there.

    An evaluation is out of date, too, where the registry has a champion that it has not compared with.
    """
    with _repository(workspace) as repo:
        if repo.status(targets=[_target(stage, workspace)]):
            return False
    metrics = json.loads(workspace.metrics(stage).read_text(encoding="utf-8"))
    if "mlflow_run_id" not in metrics:
        return True
    from tasks.registration.champion import has_changed
    from tasks.tracking import connect, record_exists  # MLflow takes seconds to import

    if not record_exists(workspace, metrics["mlflow_run_id"], metrics.get("model_version")):
        return False
    # No file says which version is the champion, so DVC cannot know that there is another to compare with.
    name = load_params(workspace.params).register_.model_name
    return "champion_version" not in metrics or not has_changed(connect(workspace), metrics, name, workspace)


def source_digests(workspace: Workspace) -> Digests:
    """Parameters, code and the user's own data as they are now: every input that no stage makes."""
    with _repository(workspace) as repo:
        made = {out.fs_path for out in repo.index.outs}
        sources = [dep for stage in repo.index.stages for dep in stage.deps if dep.fs_path not in made]
        return _digests(sources)


@contextmanager
def stage_guard(stage: str, workspace: Workspace, began: Digests | None = None) -> Iterator[None]:
    """Run a stage in the block, then commit it to DVC.

    `began` are the `source_digests` of when this process read parameters and code: what it runs is what they were then.
    Nothing is committed where the block raises, and IntegrityError names what changed where an input is no longer what
    it was.
    """
    with _repository(workspace) as repo:
        (entry,) = repo.stage.collect(_target(stage, workspace))
        before = _digests(entry.deps)
        if missing := [name for name, digest in before.items() if not digest]:
            raise DataError(f"is missing: {', '.join(missing)}", f"stage {stage}", "run the stages before it")
        _refuse_changes(stage, began or {}, before)
        # Where the user's own settings link outputs to the cache, what the stage writes must not go through the link.
        entry.unprotect_outs()
    yield
    with _repository(workspace) as repo:
        (entry,) = repo.stage.collect(_target(stage, workspace))
        _refuse_changes(stage, before, _digests(entry.deps))
    _commit(stage, workspace)


def worktree(workspace: Workspace, params: Params, name: str) -> Workspace:
    """A git worktree for a run with parameters of its own, in work/worktrees, on the same DVC cache.

    It has the code as it is now, changes that are not committed included, and what DVC knows to be up to date. A
    worktree that has the name already is brought to this state; its work folder, and with it the training of an earlier
    attempt, is kept.
    Raises ConfigError where git does not know of some code, Locked where a run is at work in that worktree.
    """
    place = Workspace(workspace.work / "worktrees" / re.sub(r"[^\w-]+", "-", name))
    _refuse_untracked_code(workspace.root)
    commit = _present(workspace.root)
    results: dict[Path, bytes] = {}
    if (place.root / ".git").exists():
        with workspace_lock(place):
            results = _small_results(place)
            _git(place.root, "checkout", "--force", "--detach", commit)
    else:
        _git(workspace.root, "worktree", "add", "--detach", str(place.root), commit)
    with workspace_lock(place):
        _write_params(workspace.params, place.params, params)
        _carry_over(workspace, place, results)
        _share_cache(workspace, place)
    return place


@contextmanager
def _repository(workspace: Workspace) -> Iterator[Repo]:
    """The DVC repository; what goes wrong in it becomes an error for people. Waits while a dvc command is at work."""
    try:
        with Repo(str(workspace.root), _wait_for_lock=True) as repo:
            yield repo
    except MissingParamsError as error:
        raise ConfigError(str(error), str(workspace.params), "write them there: DVC tracks them") from error
    except DvcException as error:
        raise IntegrityError(f"DVC: {error}", str(workspace.root), "see `dvc status`") from error


def _commit(stage: str, workspace: Workspace) -> None:
    """In a process of its own: DVC's run cache works from the repository's root, and threads share a directory."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "commit", "--force", stage]
    dvc = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=False)
    if dvc.returncode:
        raise IntegrityError(f"DVC cannot commit it: {dvc.stderr.strip()}", f"stage {stage}", "mend that and run again")


def _target(stage: str, workspace: Workspace) -> str:
    """The stage's address whatever the working directory: DVC looks up a bare name in the dvc.yaml of that one."""
    return f"{workspace.root / 'dvc.yaml'}:{stage}"


def _digests(dependencies: list[Any]) -> Digests:
    """Empty digests for what is missing."""
    found: Digests = {}
    for dependency in dependencies:
        path = str(dependency.def_path)
        if isinstance(dependency, ParamsDependency):
            values: dict[str, Any] = dependency.get_hash().value
            found |= {f"{path}:{key}": json.dumps(value) for key, value in values.items()}
        else:
            found[path] = str(dependency.get_hash().value) if dependency.exists else ""
    return found


def _refuse_changes(stage: str, before: Digests, now: Digests) -> None:
    if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
        raise IntegrityError(
            f"changed while it was used: {', '.join(changed)}",
            f"stage {stage}",
            "nothing was committed to DVC; run again, and leave these as they are until the run has ended",
        )


def _refuse_untracked_code(root: Path) -> None:
    if unknown := _git(root, "ls-files", "--others", "--exclude-standard", "--", *CODE).split():
        raise ConfigError(
            f"git does not know {', '.join(unknown)}, so a worktree would run without", str(root), "git add, or remove"
        )


def _present(root: Path) -> str:
    """A commit of the checkout as it is, tracked changes included; no branch or stash refers to it."""
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return _git(root, "stash", "create") if changed else _git(root, "rev-parse", "HEAD")


def _write_params(origin: Path, target: Path, params: Params) -> None:
    """Only what differs is written: a default spelt out would look to DVC like a change."""
    raw, wanted = yaml.safe_load(origin.read_text(encoding="utf-8")), dump_params(params)
    raw = _changed(raw, dump_params(load_params(origin)), wanted)
    target.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    found, asked = dict(flatten(dump_params(load_params(target)))), dict(flatten(wanted))
    if differing := sorted(key for key in found.keys() | asked.keys() if found.get(key) != asked.get(key)):
        raise IntegrityError(
            f"says another thing than was asked for: {', '.join(differing)}",
            str(target),
            f"write these into {origin.name} itself, and report it",
        )


def _changed(raw: Any, now: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, which is read as `now`, so that it is read as `wanted`; keys that are no longer wanted go."""
    result = {key: value for key, value in (raw or {}).items() if key in wanted}
    for key, value in wanted.items():
        present = now.get(key)
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            if value != present:
                result[key] = _changed(result.get(key), present, value)
        elif key not in now or value != present:
            result[key] = value
    return result


def _small_results(place: Workspace) -> dict[Path, bytes]:
    """What DVC leaves to git of the last run in `place`, by path in it; nothing where no stage has run there."""
    tracked = _git(place.root, "status", "--porcelain", "--", "dvc.lock")
    files = (file for name in SMALL_RESULTS for file in [place.root / name, *(place.root / name).rglob("*")])
    return {file.relative_to(place.root): file.read_bytes() for file in files if file.is_file()} if tracked else {}


def _carry_over(workspace: Workspace, place: Workspace, results: Mapping[Path, bytes]) -> None:
    """What git may not hold but the run needs: the user's own data, and the results that tell what is up to date.

    These are `results`, of the last run in `place`, if there are any.
    """
    _git(place.root, "clean", "--force", "-d", "-x", "--quiet", "--", str(place.own_data), *SMALL_RESULTS)
    own = str(workspace.own_data.relative_to(workspace.root))
    for path in _git(workspace.root, "ls-files", "--others", "-z", "--", own, *SMALL_RESULTS).split("\0"):
        if path:
            (place.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(workspace.root / path, place.root / path)
    for file, content in results.items():
        (place.root / file).parent.mkdir(parents=True, exist_ok=True)
        (place.root / file).write_bytes(content)


def _share_cache(workspace: Workspace, place: Workspace) -> None:
    with _repository(workspace) as repo:
        cache = repo.cache.local_cache_dir
    with _repository(place) as repo, repo.config.edit("local") as config:
        config["cache"]["dir"] = cache
    with _repository(place) as repo:
        repo.checkout(force=True, allow_missing=True)


def _git(root: Path, *command: str) -> str:
    """What git prints. Raises ConfigError with what it complains of."""
    git = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
    if git.returncode:
        raise ConfigError(f"git {command[0]}: {git.stderr.strip()}", str(root), "parameters of a run's own need git")
    return git.stdout.strip()
