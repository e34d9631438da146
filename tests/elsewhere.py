"""A CUDA device that is none: tensors that say they are there, and are as strict about it, computed on the CPU.

What it cannot see: kernels, their speed and rounding, memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only


class _Module:
    """What torch asks of a device's module: there is no device to be found, and no generator to be saved."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It has no generator."""


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """Nobody takes the device for an accelerator of this machine."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere", _Module(), _Hook())
THERE = torch.device("elsewhere", 0)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device. `here` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=THERE
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, refused where CUDA would refuse it."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    if func is _aten._fused_sdp_choice.default:
        return 0  # plain products: the others are kernels of the one device or the other
    if func not in _MOVES:
        _check(func, args, tensors)
    device = kwargs.get("device")
    if device is not None:
        there, kwargs = torch.device(device).type == "elsewhere", kwargs | {"device": "cpu"}
    elif func in _MOVES:
        there = isinstance(args[0], Elsewhere)
    here = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
    out = func(*here[0], **here[1])
    if not there:
        return out
    out = tree_map_only(torch.Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """A number of no dimension may come from the CPU, but not into a list."""
    listed = [x for part in args if isinstance(part, (list, tuple)) for x in part if isinstance(x, torch.Tensor)]
    places = {x.device for x in [*(x for x in tensors if x.dim()), *listed]} | {
        x.device for x in tensors if isinstance(x, Elsewhere)
    }
    if len(places) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {places}")


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within it there is another device, on which models are put when they are loaded."""
    with pytest.MonkeyPatch.context() as patch, _Mode():
        for module in (
            "ppo_core.device",
            "ppo_core.decoder",
            "ppo_core.precision",
            "benchmarks.limits",
            "benchmarks.large",
        ):
            patch.setattr(f"{module}.device", lambda: THERE)
        # Parameters keep their identity when a module moves, as on a real device: tied weights stay tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # what is made of Python's numbers begins on the CPU
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_swap_module_params_on_conversion(False)
