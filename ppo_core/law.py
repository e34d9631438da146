"""The law that samples: softmax(logits / T) over the tokens that top-k, top-p and the minimum length leave.

What was left is recorded while sampling and used again in every log-probability afterwards, of the policy and of the
reference: the sampled token's probability is then the one that it was drawn with, and the KL of two equal models is 0.
Shapes: B batch, R response position, N response tokens, V vocabulary, K tokens of the largest kept set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppo_core.config import SamplingConfig
from ppo_core.errors import ConfigError
from ppo_core.types import ResponseTokens


class SamplingLaw:
    """A `SamplingConfig` and the tokens that end a response."""

    def __init__(
        self,
        config: SamplingConfig,
        stop_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """`stop_tokens` are ids, EOS among them; `decode` turns ids into text and is needed for stop strings alone."""
        if config.stop_strings and decode is None:
            raise ConfigError("cannot be seen in token ids", "ppo.sampling.stop_strings", "pass `decode`")
        self.config, self.stop_tokens, self.decode = config, tuple(stop_tokens), decode
        self.temperature = config.temperature
        self._top_p = 1.0 if config.top_p is None else config.top_p
        # A token has at least one byte, so a string of n bytes that ends in the last token lies in the last n tokens.
        # One more, because some tokenizers drop the space before the first token that they decode.
        self._tail = max((len(text.encode()) + 1 for text in config.stop_strings), default=0)

    @classmethod
    def of(cls, config: SamplingConfig, tokenizer: Any) -> SamplingLaw:
        """The law for a transformers tokenizer.

        Raises ConfigError for a stop token that it does not have, and if nothing could end a response.
        """
        known = tokenizer.get_vocab()
        if unknown := [text for text in config.stop_tokens if text not in known]:
            raise ConfigError(
                f"{unknown} are no tokens of this model", "ppo.sampling.stop_tokens", "use ppo.sampling.stop_strings"
            )
        tokens = [known[text] for text in config.stop_tokens]
        if tokenizer.eos_token_id is not None:
            tokens.insert(0, tokenizer.eos_token_id)
        elif not tokens and not config.stop_strings:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so nothing could end a response",
                "ppo.sampling.stop_tokens",
                "name a token that ends one, or set ppo.sampling.stop_strings",
            )
        return cls(config, tokens, partial(tokenizer.decode, clean_up_tokenization_spaces=False))

    @property
    def truncates(self) -> bool:
        """Whether kept sets have to be recorded."""
        return self.config.top_k is not None or self._top_p < 1

    def at_step(self, logits: Tensor, t: int) -> Tensor:
        """Logits [B, V] of response position `t` with -inf for what cannot be sampled there."""
        if t < self.config.min_new_tokens:
            stops = torch.tensor(self.stop_tokens, dtype=torch.long, device=logits.device)
            logits = logits.index_fill(-1, stops, -math.inf)
        if self.config.top_k is not None:
            kept = logits.topk(min(self.config.top_k, logits.shape[-1])).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
        if self._top_p < 1:
            logits = logits.masked_fill(~_nucleus(logits / self.temperature, self._top_p), -math.inf)
        return logits

    def restricted(self, logits: Tensor, tokens: ResponseTokens) -> Tensor:
        """Logits [N, V] that predict `tokens`, with -inf where the sampler had it."""
        if tokens.kept is not None:
            # One place more than there are tokens, for the filling.
            allowed = torch.zeros(len(logits), logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
            allowed.scatter_(-1, torch.where(tokens.kept < 0, logits.shape[-1], tokens.kept), True)
            return logits.masked_fill(~allowed[..., :-1], -math.inf)
        if self.config.min_new_tokens:
            early = tokens.positions < self.config.min_new_tokens
            stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            stops[list(self.stop_tokens)] = True
            return logits.masked_fill(early.unsqueeze(-1) & stops, -math.inf)
        return logits

    def ends(self, response: Sequence[int]) -> bool:
        """Whether a response's last token completes a stop string, and the response is long enough to end."""
        if not self._tail or len(response) < self.config.min_new_tokens:
            return False
        assert self.decode is not None
        tail = response[-self._tail :]
        text = self.decode(tail)
        # A character that lacks some of its bytes, which the last token may bring, is read as U+FFFD.
        known = len(self.decode(tail[:-1]).rstrip("\ufffd"))
        return any(stop in text and text.rindex(stop) + len(stop) > known for stop in self.config.stop_strings)


def kept_set(logits: Tensor) -> Tensor:
    """The tokens [B, k] that restricted logits [B, V] leave, each row filled up with -1 to the largest set."""
    top = logits.topk(int((~logits.isneginf()).sum(dim=-1).max()))
    return torch.where(top.values.isneginf(), -1, top.indices)


def stack_sets(sets: Sequence[Tensor], steps: int) -> Tensor:
    """The kept sets [B, k] of the first positions as [B, R, K] with R = `steps`: no set where nothing was sampled."""
    widest = max(kept.shape[1] for kept in sets)
    stacked = torch.stack([pad(kept, (0, widest - kept.shape[1]), value=-1) for kept in sets], dim=1)
    return pad(stacked, (0, 0, 0, steps - len(sets)), value=-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches `top_p`, [B, V] bool (Holtzman et al. 2020)."""
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < top_p)
