"""Sampling responses. Shapes: B batch, P prompt, R response, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_core.config import SamplingConfig
from ppo_core.logprobs import token_logprobs
from ppo_core.types import Samples, Sequences, pad_prompts


@torch.no_grad()
def sample(
    decoder: nn.Module,
    lm_head: nn.Module,
    prompts: list[list[int]],
    config: SamplingConfig,
    seeds: Sequence[int],
    eos: int,
    pad: int,
) -> Samples:
    """One response to each prompt.

    Row b draws its uniforms from a generator of its own, seeded by `seeds[b]`, and turns them into tokens through the
    inverse of the distribution function: its sample does not depend on its neighbours, and two models given the same
    seeds draw with common random numbers.
    """
    from transformers import DynamicCache

    tokens, attention = pad_prompts(prompts, pad)
    steps = config.max_new_tokens
    uniforms = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    cache: Any = DynamicCache()
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    responses = torch.full((len(prompts), steps), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), steps, dtype=torch.bool)
    logprobs = torch.zeros(len(prompts), steps)
    running = torch.ones(len(prompts), dtype=torch.bool)
    ids = tokens
    for t in range(steps):
        out = decoder(
            input_ids=ids,
            attention_mask=torch.cat([attention, mask[:, :t]], dim=1).long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = lm_head(out.last_hidden_state[:, -1]).float()
        drawn = inverse_cdf(logits / config.temperature, uniforms[:, t])
        logprobs[:, t] = torch.where(running, token_logprobs(logits, drawn, config.temperature), 0.0)
        responses[:, t] = torch.where(running, drawn, pad)
        mask[:, t] = running
        running = running & (drawn != eos)
        if not running.any():
            break
        # A row that has ended goes on as padding, seen by nobody.
        ids, positions = responses[:, t : t + 1], positions[:, -1:] + 1
    sequences = Sequences(torch.cat([tokens, responses], 1), torch.cat([attention, mask], 1), tokens.shape[1])
    return Samples(sequences, logprobs, ended=~running)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] drawn from softmax(logits [B, V]): the first whose cumulative probability exceeds the uniform [B]."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # The last sum is 1 only up to rounding; scaling the uniform keeps the draw inside the vocabulary.
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
