"""What the stages log, in the terminal and in the run's log; errors meant for people without a wall of traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.errors import ProximalError

OURS = ("flows", "tasks", "ppo_core")
_ENGINES = ("prefect.task_runs", "prefect.flow_runs")


@contextmanager
def forwarded() -> Iterator[None]:
    """Send our loggers' records to the handlers of `prefect.extra`, wherever the flow runs.

    PREFECT_LOGGING_EXTRA_LOGGERS does this only if it is set before Prefect is imported, and leaves their level alone.
    """
    handlers = logging.getLogger("prefect.extra").handlers
    loggers = [logging.getLogger(name) for name in OURS]
    levels = [logger.level for logger in loggers]
    engines = [logging.getLogger(name) for name in _ENGINES]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
    for engine in engines:
        engine.addFilter(_shorten)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        for engine in engines:
            engine.removeFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Leave the message of one of our errors; its traceback goes to the level DEBUG."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ProximalError):
        logging.getLogger(__name__).debug("traceback", exc_info=record.exc_info)
        record.exc_info = record.exc_text = None
        record.msg, record.args = "%s: %s", (type(error).__name__, error)
    return True
