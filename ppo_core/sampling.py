"""Sampling responses. Shapes: B batch, P prompt, R response, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_core.decoder import takes_positions
from ppo_core.law import SamplingLaw, kept_set, stack_sets
from ppo_core.logprobs import token_logprobs
from ppo_core.types import Samples, Sequences, pad_prompts


@torch.no_grad()
def sample(
    decoder: Any,
    lm_head: Callable[[Tensor], Tensor],
    prompts: list[list[int]],
    law: SamplingLaw,
    seeds: Sequence[int],
    pad: int,
) -> Samples:
    """One response to each prompt.

    Row b draws its uniforms from a generator of its own, seeded by `seeds[b]`, and turns them into tokens through the
    inverse of the distribution function: its sample does not depend on its neighbours, and two models given the same
    seeds draw with common random numbers.
    """
    from transformers import DynamicCache

    tokens, attention = pad_prompts(prompts, pad)
    steps = law.config.max_new_tokens
    uniforms = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    stop_tokens = torch.tensor(law.stop_tokens, dtype=torch.long)
    cache: Any = DynamicCache(config=decoder.config)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    with_positions = takes_positions(decoder)
    responses = torch.full((len(prompts), steps), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), steps, dtype=torch.bool)
    logprobs = torch.zeros(len(prompts), steps)
    running = torch.ones(len(prompts), dtype=torch.bool)
    stopped = torch.zeros(len(prompts), dtype=torch.bool)
    kept: list[Tensor] = []
    ids = tokens
    for t in range(steps):
        out = decoder(
            input_ids=ids,
            attention_mask=torch.cat([attention, mask[:, :t]], dim=1).long(),
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions} if with_positions else {}),
        )
        logits = law.at_step(lm_head(out.last_hidden_state[:, -1]).float(), t)
        drawn = inverse_cdf(logits / law.temperature, uniforms[:, t])
        logprobs[:, t] = torch.where(running, token_logprobs(logits, drawn, law.temperature), 0.0)
        responses[:, t] = torch.where(running, drawn, pad)
        mask[:, t] = running
        if law.truncates:
            kept.append(torch.where(running.unsqueeze(1), kept_set(logits), -1))
        stopped |= running & torch.isin(drawn, stop_tokens)
        running = running & ~stopped & ~_completes_a_string(law, responses[:, : t + 1], running)
        if not running.any():
            break
        # A row that has ended goes on as padding, seen by nobody.
        ids, positions = responses[:, t : t + 1], positions[:, -1:] + 1
    sequences = Sequences(
        torch.cat([tokens, responses], 1),
        torch.cat([attention, mask], 1),
        tokens.shape[1],
        stack_sets(kept, steps) if kept else None,
    )
    return Samples(sequences, logprobs, ended=~running, text_lengths=mask.sum(dim=1) - stopped.long())


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] drawn from softmax(logits [B, V]): the first whose cumulative probability exceeds the uniform [B]."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The last sum is 1 only up to rounding. What is below it is exceeded, and first by a token that has probability.
    threshold = (uniforms.unsqueeze(1) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _completes_a_string(law: SamplingLaw, responses: Tensor, running: Tensor) -> Tensor:
    """Rows [B] whose response, in `responses` [B, t + 1], has just completed a stop string."""
    if not law.config.stop_strings:
        return torch.zeros_like(running)
    rows = zip(responses.tolist(), running.tolist(), strict=True)
    return torch.tensor([alive and law.ends(ids) for ids, alive in rows])
