"""Low-precision arithmetic with float32 masters: forward and backward in bfloat16, the optimiser in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache, partial

import torch
from torch import Tensor, nn

from ppo_core.device import device

log = logging.getLogger(__name__)


@cache
def arithmetic(name: str) -> torch.dtype:
    """The dtype that `ModelConfig.dtype` names; for "auto", what this machine is fast in, said once in the log."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device().type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            log.info("arithmetic in bfloat16, with float32 masters: this GPU has instructions for it")
            return torch.bfloat16
        log.info("arithmetic in float32: this GPU has no bfloat16 instructions, and would have to emulate them")
        return torch.float32
    features = torch.cpu.get_capabilities()
    native = next((f for f in ("amx_bf16", "avx512_bf16", "bf16") if features.get(f)), None)
    if native:
        log.info("arithmetic in bfloat16, with float32 masters: this processor has %s", native)
        return torch.bfloat16
    log.info("arithmetic in float32: this processor has no bfloat16 instructions, and would have to emulate them")
    return torch.float32


class MasterWeights:
    """Float32 copies of trained parameters, which collect gradients and are what the optimiser moves.

    Each gradient is added to the master's, in float32, as soon as the backward pass has it, and freed: those of
    micro-batches add up, and never lie in memory twice. Where a parameter is float32 already it is its own master.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.working = [parameter.requires_grad_(True) for parameter in parameters]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.working]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_collect, master))
            for parameter, master in zip(self.working, self.masters, strict=True)
            if parameter is not master
        ]

    def release(self) -> None:
        """Freeze the parameters, and collect no more of their gradients."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.working:
            parameter.requires_grad_(False)

    def publish(self) -> None:
        """Round the masters into the parameters that compute."""
        with torch.no_grad():
            for parameter, master in zip(self.working, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)

    def state(self) -> list[Tensor]:
        return [master.detach() for master in self.masters]

    def load(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for master, tensor in zip(self.masters, tensors, strict=True):
                master.copy_(tensor)
        self.publish()


def _collect(master: Tensor, parameter: Tensor) -> None:
    grad = parameter.grad
    assert grad is not None
    if master.grad is None:
        master.grad = grad.float().to_dense()
    elif grad.is_sparse:
        master.grad += grad.float()
    elif grad.is_cuda:
        master.grad += grad  # cast on the way
    else:
        # A piece at a time: a float32 copy of the whole would leave the cache, and take four times as long.
        for total, piece in zip(*(whole.flatten().split(1 << 20) for whole in (master.grad, grad)), strict=True):
            total += piece.float()
    parameter.grad = None
