"""Servers that end with the process that started them, whichever way that ends.

`python -m flows.leash COMMAND...` runs a command in its own session until standard input ends; then the whole session
is told to end. The kernel closes that pipe even for a parent that was killed. Standard library only: it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE_SECONDS = 8


@contextmanager
def leashed(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`command` as a child, what it prints in `log`, until the block ends or this process dies."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C in the terminal reaches us, not the server that has to record what we did.
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.leash", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            cwd=Path(__file__).resolve().parents[1],
            start_new_session=True,
            umask=0o077,  # data bases and logs are for this user alone
        )
    try:
        yield child
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


def hold(command: Sequence[str]) -> int:
    """Run `command` until it ends, standard input ends or SIGTERM arrives. Returns its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _end(child))
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    status = child.wait()
    _signal(child, signal.SIGKILL)  # what the command itself started and left behind
    return status


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal(child, signal.SIGTERM)
    last_word = threading.Timer(PATIENCE_SECONDS, _signal, (child, signal.SIGKILL))
    last_word.daemon = True
    last_word.start()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(hold(sys.argv[1:]))
