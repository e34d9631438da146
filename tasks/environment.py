"""Settings of the tools that every entry point makes before it imports them."""

from __future__ import annotations

import ctypes
import os
import sys
from urllib.parse import unquote, urlsplit

_DEFAULTS = {
    # No tool reports home.
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GX_ANALYTICS_ENABLED": "false",
    # The server starts no job runners.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # MLflow prints the tracking address when a run ends, with the password that may stand in it.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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

_FIXED = {
    # Nothing is unpickled, whatever a file says that it is and whatever the environment would allow.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
}


def prepare() -> None:
    """Set what is not set already, for the user's own environment wins; but never may a pickle be loaded."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_FIXED)
    _hide_tracking_password()
    _keep_freed_memory()


def _hide_tracking_password() -> None:
    """Take user and password out of a server's address: MLflow repeats the address in what it says and raises."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
        os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel.

    The page faults of each new tensor of logits cost more than the arithmetic on it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
