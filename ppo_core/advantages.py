"""Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438)."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_core.masking import counted


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, both [B, R].

    With V_t = `values[:, t]`, the value of the state before token t, and V = 0 after the last token that counts:

        delta_t = r_t + gamma V_{t+1} - V_t                    (equation 10)
        A_t     = delta_t + gamma lam A_{t+1}                  (equation 16, as a recursion)
        return  = A_t + V_t                                    (the value function's target)

    float32 and float64 are kept, anything shorter is computed in float32. Masked positions are 0.
    """
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = counted(rewards.to(dtype), mask), counted(values.to(dtype), mask)
    # Masked values are 0, so the shifted row already holds V = 0 after the last token that counts.
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        # A position that does not count has no delta, and nothing to hand on.
        running = torch.where(mask[:, t], deltas[:, t] + gamma * lam * running, torch.zeros_like(running))
        advantages[:, t] = running
    return advantages, counted(advantages + values, mask)
