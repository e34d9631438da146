"""What a stage lacks is told for people; what is a bug stays one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tasks.errors import DataError, ProximalError, ResourceError
from tasks.stages import machine_errors
from tasks.workspace import Workspace


@pytest.mark.parametrize(
    ("error", "told", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "data/x"), DataError, "data/x — is missing.*`dvc repro ppo`"),
        (MemoryError("40 GiB"), ResourceError, "ppo — memory is not enough: 40 GiB — lower ppo.update.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError, "memory is not enough"),
        (RuntimeError("CUDA out of memory"), ResourceError, "memory is not enough"),
        (OSError(errno.ENOSPC, "No space left on device", "models/x"), ResourceError, "models/x — the disk is full"),
    ],
)
def test_what_is_lacking_is_told_for_people(
    tmp_path: Path, error: Exception, told: type[ProximalError], words: str
) -> None:
    with pytest.raises(told, match=words) as caught, machine_errors("ppo", Workspace(tmp_path)):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.fault("19: memory is not enough", expected="exit 8, what to lower")
def test_memory_that_is_not_there(tmp_path: Path) -> None:
    told = pytest.raises(ResourceError, match=r"ppo — memory is not enough.*— lower ppo\.update\.micro_batch")
    with told as caught, machine_errors("ppo", Workspace(tmp_path)):
        torch.empty(1 << 50)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EIO, "I/O error"), KeyError("x")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, machine_errors("ppo", Workspace(tmp_path)):
        raise error
    assert caught.value is error
