"""Work that goes on beside a flow or task for as long as a block of it lasts."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 5.0


@contextmanager
def meanwhile(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do `work` in a thread of that name until it returns or the event that it gets is set, as the block ends.

    The thread sees the settings and the run that this code sees, so that what it logs reaches the run's log.
    """
    ended = threading.Event()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work, ended), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=PATIENCE_SECONDS)
