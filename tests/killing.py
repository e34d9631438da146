"""A stage killed by SIGKILL at a named point of its own code, and begun again.

    PROXIMAL_KILL_AT="rolled out:2" python tests/killing.py ppo --workspace FOLDER

is `python -m tasks ppo --workspace FOLDER`, but that it dies the second time that it gets there. The product knows
nothing of this: the points are wrapped around its functions before it begins. Without the variable it is the same as
`python -m tasks`.

`Stages` does this many times without importing the libraries anew: a process that has them forks one for each.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "PROXIMAL_KILL_AT"
LIBRARIES = (
    "tasks.ppo",
    "tasks.register",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
)
"""What the stages would each take seconds to import."""
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Point:
    """Before or after a function (`module:name`, `module:Class.name`); if `inside` names another, only within that."""

    when: Literal["before", "after"]
    function: str
    inside: str = ""


STEP, SAVE = "ppo_core.trainer:Trainer.step", "ppo_core.checkpoint:save_checkpoint"
RECORD = "tasks.tracking:Tracker.log_cycle"
CLIENT = "mlflow:MlflowClient"
POINTS = {
    # a cycle
    "run opened": Point("after", "tasks.tracking:Tracker.open"),
    "cycle begun": Point("before", "tasks.ppo:PPORun.next_cycle"),
    "sampled": Point("before", "ppo_core.rollout:ModelReward.__call__", STEP),
    "scored": Point("after", "ppo_core.rollout:ModelReward.__call__", STEP),
    "rolled out": Point("after", "ppo_core.trainer:Trainer.score"),
    "advantages estimated": Point("after", "ppo_core.trainer:Trainer.estimate"),
    "gradient computed": Point("before", "torch.optim:AdamW.step", STEP),
    "optimiser stepped": Point("after", "torch.optim:AdamW.step", STEP),
    "iteration done": Point("after", STEP),
    "dev prompts answered": Point("after", "tasks.models.responses:Examiner.ask"),
    # its checkpoint: the first is the trainer's state, the second the cycle's weights and record
    "save begun": Point("before", SAVE),
    "tensors written": Point("after", "ppo_core.checkpoint:save_file", SAVE),
    "file digested": Point("after", "ppo_core.checkpoint:sha256", SAVE),
    "manifest written": Point("before", "ppo_core.checkpoint:_sync", SAVE),
    "file synced": Point("after", "ppo_core.checkpoint:_sync", SAVE),
    "all synced": Point("before", "pathlib:Path.rename", SAVE),
    "renamed": Point("after", "pathlib:Path.rename", SAVE),
    "saved": Point("after", SAVE),
    "old state half removed": Point("after", "os:unlink", "tasks.run_folder:RunFolder.tidy"),
    "old states removed": Point("after", "tasks.run_folder:RunFolder.tidy"),
    # its record in MLflow
    "run created": Point("after", f"{CLIENT}.create_run"),
    "model created": Point("after", f"{CLIENT}.create_logged_model", RECORD),
    "model uploaded": Point("after", f"{CLIENT}.log_model_artifacts", RECORD),
    "model finalised": Point("after", f"{CLIENT}.finalize_logged_model", RECORD),
    "model linked": Point("after", f"{CLIENT}.log_outputs", RECORD),
    "figures recorded": Point("after", f"{CLIENT}.log_batch", RECORD),
    "cycle recorded": Point("after", RECORD),
    # the end of the stage
    "policy written beside": Point("before", "pathlib:Path.rename", "tasks.ppo:PPORun._write_policy"),
    "policy in place": Point("after", "pathlib:Path.rename", "tasks.ppo:PPORun._write_policy"),
    "critic written beside": Point("before", "pathlib:Path.rename", "tasks.models.critic:write_critic"),
    "critic in place": Point("after", "pathlib:Path.rename", "tasks.models.critic:write_critic"),
    "result recorded": Point("after", "tasks.tracking:Tracker.log_stage"),
    "metrics written": Point("after", "tasks.stages:write_metrics"),
    # registration
    "version created": Point("after", f"{CLIENT}.create_model_version"),
    "version verified": Point("after", "tasks.registration.registry:verify_version"),
    "alias set": Point("after", f"{CLIENT}.set_registered_model_alias"),
}


def arm(kill_at: str) -> None:
    """`NAME:N`: SIGKILL to this process the N-th time that it is at the point; `NAME:N:SIGSTOP` halts it there."""
    name, n, *how = kill_at.split(":")
    point, left, depth = POINTS[name], int(n), 0
    number = signal.Signals[how[0]] if how else signal.SIGKILL

    def reached() -> None:
        nonlocal left
        left -= not point.inside or depth > 0
        if left == 0:
            os.kill(os.getpid(), number)

    def at_the_point(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if point.when == "before":
                reached()
            result = function(*args, **kwargs)
            if point.when == "after":
                reached()
            return result

        return wrapped

    def around(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1

        return wrapped

    _wrap(point.function, at_the_point)
    if point.inside:
        _wrap(point.inside, around)


def _wrap(path: str, wrapper: Any) -> None:
    """Put `wrapper(function)` in the place of the function, and in that of every name that our modules gave it."""
    module, name = path.split(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    found = inspect.getattr_static(owner, attribute)
    if isinstance(found, classmethod):
        wrapped: Any = classmethod(wrapper(found.__func__))
    else:
        wrapped = wrapper(found)
    setattr(owner, attribute, wrapped)
    if not parents:
        for other in [m for n, m in sys.modules.items() if re.match(r"(ppo_core|tasks)\.", n)]:
            if getattr(other, attribute, None) is found:
                setattr(other, attribute, wrapped)


class Stages:
    """Runs stages one after another, each in a process of its own. Made by `stages`."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        self.running: int | None = None

    def begin(self, command: list[str], log: Path, kill_at: str = "", env: dict[str, str] | None = None) -> int:
        """Start it; its process id. It is a child of the server, which reaps it."""
        return self._order({"command": command, "log": str(log), "kill_at": kill_at, "env": env or {}})

    def end(self) -> int:
        """Wait for it; its exit status, -9 if it was killed."""
        status = self._answer()
        self.running = None
        return status

    def run(self, command: list[str], log: Path, kill_at: str = "", env: dict[str, str] | None = None) -> int:
        """Start it and wait."""
        self.begin(command, log, kill_at, env)
        return self.end()

    def run_for(self, seconds: float, command: list[str], log: Path) -> int:
        """Start it, kill it after so many seconds; 0 if it has ended before."""
        self._order({"command": command, "log": str(log), "kill_after": seconds})
        return self.end()

    def _order(self, order: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self.running = self._answer()
        return self.running

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


@contextmanager
def stages() -> Iterator[Stages]:
    """The server of `Stages`, which ends with the block, or with this process."""
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with server:
        made = Stages(server)
        yield made
        if made.running:  # a test failed while it was stopped
            os.kill(made.running, signal.SIGKILL)
        assert server.stdin is not None
        server.stdin.close()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
        print(child, file=answers, flush=True)
        if "kill_after" in order:
            time.sleep(order["kill_after"])
            os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


def _become(order: dict[str, Any]) -> None:
    """The stage, in a forked process; what it prints goes to its log."""
    with Path(order["log"]).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(order.get("env", {}))
    try:
        os._exit(_run(order["command"], order.get("kill_at", "")))
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _run(command: list[str], kill_at: str) -> int:
    from tasks.__main__ import main

    if kill_at:
        arm(kill_at)
    return main(command)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from tasks import environment

    environment.prepare()
    if len(sys.argv) > 1:
        sys.exit(_run(sys.argv[1:], os.environ.get(VARIABLE, "")))
    for module in LIBRARIES:
        importlib.import_module(module)
    _serve()
