"""The errors of the pipeline, beside those of the algorithm (`ppo_core.errors`)."""

from __future__ import annotations

from ppo_core.errors import (
    ConfigError,
    IntegrityError,
    Problem,
    ProximalError,
    ResourceError,
    ResumeMismatch,
    TrainingHealthError,
)


class DataError(ProximalError):
    """Data is missing, changed, malformed, or breaks a critical expectation."""

    exit_code = 3


class Locked(ProximalError):
    """Another run holds the workspace."""

    exit_code = 6


class ServiceError(ProximalError):
    """A service (package index, hub, MLflow, Prefect, vLLM) does not answer."""

    exit_code = 9


__all__ = [
    "ConfigError",
    "DataError",
    "IntegrityError",
    "Locked",
    "Problem",
    "ProximalError",
    "ResourceError",
    "ResumeMismatch",
    "ServiceError",
    "TrainingHealthError",
]
