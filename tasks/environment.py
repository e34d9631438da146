"""Settings of the tools that every entry point makes before it imports them."""

from __future__ import annotations

import ctypes
import os
import sys

_DEFAULTS = {
    # No tool reports home.
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Nothing is unpickled on loading a model, and the server starts no job runners.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # A tracking server that has gone is noticed in seconds (by default MLflow tries for four minutes a call).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # So is a Prefect server (by default a minute a call).
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    # A GPU slot whose holder died is freed even if the server restarted meanwhile.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare() -> None:
    """Set what is not set already: the user's own environment wins."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel.

    The page faults of each new tensor of logits cost more than the arithmetic on it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
