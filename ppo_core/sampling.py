"""Sampling responses. Shapes: B batch, P prompt, R response, T = P + R, D width, V vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as fill

from ppo_core.decoder import LMHead, Stack, takes_positions
from ppo_core.law import SamplingLaw, kept_set, stack_sets
from ppo_core.llama import LlamaDecoding
from ppo_core.packed import obstacle_to_packing
from ppo_core.types import Samples, Sequences, pad_prompts

log = logging.getLogger(__name__)

_TINY = 1e-38
LEAVING = 4
"""Once one row in so many has ended, those that have leave the batch: each time costs a copy of the cache."""


class Sampler:
    """The stacks that a token passes through: a trunk whose output is worth keeping, if there is one, and the rest.

    Over a trunk, `top` must be a clone of its own: its layers are given new numbers.
    """

    def __init__(self, trunk: Stack | None, top: Stack) -> None:
        self.trunk, self.top = trunk, top
        decoder: Any = top.decoder
        if trunk is not None:
            # Each stack has a cache of its own, in which its layers count from 0.
            for i, layer in enumerate(decoder.layers):
                for module in layer.modules():
                    if hasattr(module, "layer_idx"):
                        module.layer_idx = i

        self.decoders: list[Any] = [stack.decoder for stack in (trunk, top) if stack is not None]
        self.obstacle = obstacle_to_packing(self.decoders)
        way = f"as transformers has them: {self.obstacle}" if self.obstacle else "packed: the model is built like Llama"
        log.info("layers run %s", way)

    @property
    def device(self) -> torch.device:
        return next(self.top.parameters()).device

    def start(self) -> Decoding | LlamaDecoding:
        """A decoding of a new batch."""
        return Decoding(self.decoders) if self.obstacle else LlamaDecoding(self.decoders)


class Decoding:
    """A batch on its way: tokens in, hidden states out, keys and values of what came before in caches."""

    def __init__(self, decoders: Sequence[Any]) -> None:
        from transformers import DynamicCache

        self.decoders = decoders
        self.caches: list[Any] = [DynamicCache(config=decoder.config) for decoder in decoders]

    def step(self, tokens: Tensor, attention: Tensor, positions: Tensor, trunk_only: bool = False) -> list[Tensor]:
        """The output [B, t, D] of each stack for the newest tokens [B, t]; `attention` covers all tokens so far."""
        outputs: list[Tensor] = []
        for decoder, cache in zip(self.decoders[: 1 if trunk_only else None], self.caches, strict=False):
            inputs: dict[str, Any] = {"inputs_embeds": outputs[-1]} if outputs else {"input_ids": tokens}
            if takes_positions(decoder):
                inputs["position_ids"] = positions
            out = decoder(**inputs, attention_mask=attention.long(), past_key_values=cache, use_cache=True)
            outputs.append(out.last_hidden_state)
        return outputs

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for cache in self.caches:
            cache.reorder_cache(rows)  # which every kind of layer has; fewer rows are welcome


@torch.no_grad()
def sample(
    sampler: Sampler,
    lm_head: LMHead | Callable[[Tensor], Tensor],
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
    device = sampler.device
    tokens, attention = pad_prompts(prompts, pad, device)
    draws = [torch.rand(law.config.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    # Drawn on the CPU whatever the device, so that the same seeds give the same numbers everywhere.
    uniforms = torch.stack(draws).to(device)
    record = _Record(len(prompts), law, pad, device)
    # Its weights, like the layers', are laid out once for all tokens.
    head = lm_head.fixed() if isinstance(lm_head, LMHead) else lm_head
    decoding, rows, left = sampler.start(), torch.arange(len(prompts), device=device), len(prompts)
    ids, positions = tokens, (attention.cumsum(dim=1) - 1).clamp(min=0)
    for t in range(law.config.max_new_tokens):
        *trunk, hidden = decoding.step(ids, torch.cat([attention, record.mask[:, :t]], dim=1)[rows], positions)
        record.take_activations(trunk, rows)
        logits = law.at_step(head(hidden[:, -1]).float(), t)
        drawn, logprobs = inverse_cdf(logits, law.temperature, uniforms[rows, t])
        alive = record.running[rows]
        record.take(t, rows, drawn, logprobs, logits)
        positions = positions[:, -1:] + 1
        # The last token of a row that has just ended passes through the trunk once more; then the row may leave.
        if (len(rows) - left) * LEAVING >= len(rows):
            decoding.keep(alive.nonzero().squeeze(1))
            rows, positions = rows[alive], positions[alive]
        ids = record.responses[rows, t : t + 1]
        # The one number that a token waits for: a GPU must have finished before the CPU can know it.
        if not (left := int(record.running.sum())):
            break
    if sampler.trunk is not None:
        seen = torch.cat([attention, record.mask[:, : t + 1]], dim=1)[rows]
        record.take_activations(decoding.step(ids, seen, positions, trunk_only=True), rows)
    return record.samples(tokens, attention)


class _Record:
    """What is written down of a batch while it is sampled."""

    def __init__(self, size: int, law: SamplingLaw, pad: int, device: torch.device) -> None:
        steps = law.config.max_new_tokens
        self.law, self.stop_tokens = law, torch.tensor(law.stop_tokens, dtype=torch.long, device=device)
        self.responses = torch.full((size, steps), pad, dtype=torch.long, device=device)
        self.mask = torch.zeros(size, steps, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(size, steps, device=device)
        self.running = torch.ones(size, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(size, dtype=torch.bool, device=device)
        """By EOS or a stop token."""
        self.kept: list[Tensor] = []
        self.activations: list[Tensor] = []

    def take(self, t: int, rows: Tensor, drawn: Tensor, logprobs: Tensor, logits: Tensor) -> None:
        """The tokens [b] drawn at position `t` for `rows` [b], from restricted logits [b, V]."""
        alive = self.running[rows]
        self.mask[:, t] = self.running
        # Selected and not indexed by `alive`: how many there are the CPU would have to wait for.
        self.responses[rows, t] = torch.where(alive, drawn, self.responses[rows, t])
        self.logprobs[rows, t] = torch.where(alive, logprobs, 0.0)
        if self.law.truncates:
            sets = kept_set(logits)
            none = sets.new_full((len(self.running), sets.shape[1]), -1)
            self.kept.append(none.index_put((rows,), torch.where(alive.unsqueeze(1), sets, -1)))
        self.stopped[rows] |= alive & torch.isin(drawn, self.stop_tokens)
        self.running = self.running & ~self.stopped
        if self.law.config.stop_strings:
            texts = zip(self.running.tolist(), self.responses[:, : t + 1].tolist(), strict=True)
            going_on = [running and not self.law.ends(text) for running, text in texts]
            self.running = torch.tensor(going_on, device=self.running.device)

    def take_activations(self, trunk: Sequence[Tensor], rows: Tensor) -> None:
        """The trunk's output [b, t, D] for the newest tokens of `rows`; nothing where there is no trunk."""
        for hidden in trunk:
            whole = hidden.new_zeros(len(self.running), *hidden.shape[1:])
            self.activations.append(whole.index_put((rows,), hidden))

    def samples(self, tokens: Tensor, attention: Tensor) -> Samples:
        """The record as a whole, behind prompts [B, P]."""
        steps, p = self.responses.shape[1], tokens.shape[1]
        sequences = Sequences(
            torch.cat([tokens, self.responses], 1),
            torch.cat([attention, self.mask], 1),
            p,
            stack_sets(self.kept, steps) if self.kept else None,
        )
        activations = None
        if self.activations:
            seen = torch.cat(self.activations, dim=1)
            activations = fill(seen, (0, 0, 0, p + steps - seen.shape[1]))
        text = self.mask.sum(dim=1) - self.stopped.long()
        return Samples(sequences, self.logprobs, ended=~self.running, text_lengths=text, activations=activations)


def inverse_cdf(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from softmax(logits [B, V] / temperature), and their log-probabilities.

    The token is the first whose cumulative probability exceeds the uniform [B].
    """
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The last sum is 1 only up to rounding. What is below it is exceeded, and first by a token that has probability.
    threshold = (uniforms.unsqueeze(1) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return drawn.squeeze(1), probabilities.gather(1, drawn).clamp(min=_TINY).log().squeeze(1)
