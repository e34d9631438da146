"""Decoding with packed layers against transformers' own forward pass over the whole text at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import plain_model, tiny_model
from torch import Tensor

from ppo_core import llama
from ppo_core.config import ModelConfig
from ppo_core.decoder import Stack, clone, split
from ppo_core.llama import LlamaDecoding
from ppo_core.models import ActorCritic
from ppo_core.packed import obstacle_to_packing
from ppo_core.sampling import Decoding, Sampler

PROMPT, RESPONSE = 5, 9
PADDING = (0, 3, 1)
"""Places before the prompt of each row where nothing stands."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "BLOCK", 4)  # so that the cache grows in the middle of a response, and twice


def texts(rows: int = len(PADDING)) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], where they stand, and their positions."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 128, (rows, PROMPT + RESPONSE), generator=draw)
    attention = torch.arange(PROMPT + RESPONSE) >= torch.tensor(PADDING[:rows]).unsqueeze(1)
    return tokens, attention, (attention.cumsum(dim=1) - 1).clamp(min=0)


def decoded(decoding: Any, leaving_at: int | None = None) -> list[Tensor]:
    """What each stack says of `texts`, prompt first and then a token at a time; row 1 may leave on the way."""
    tokens, attention, positions = texts()
    rows = torch.arange(len(tokens))
    seen = [decoding.step(tokens[:, :PROMPT], attention[:, :PROMPT], positions[:, :PROMPT])]
    for t in range(PROMPT, PROMPT + RESPONSE):
        if t == leaving_at:
            rows = torch.tensor([0, 2])
            decoding.keep(rows)
            seen = [[hidden[rows] for hidden in step] for step in seen]
        now = slice(t, t + 1)
        seen.append(decoding.step(tokens[rows, now], attention[rows, : t + 1], positions[rows, now]))
    return [torch.cat(parts, dim=1) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("leaving_at", [None, 7, 12])
def test_a_token_at_a_time_gives_what_the_whole_text_gives(leaving_at: int | None):
    model = tiny_model("Llama", rope_parameters={"rope_theta": 50.0})
    trunk, top = split(model, 1)
    found = decoded(Sampler(trunk, clone(top)).start(), leaving_at)
    tokens, attention, positions = texts()
    with torch.no_grad():
        whole = model.model(
            tokens, attention_mask=attention.long(), position_ids=positions, output_hidden_states=True, use_cache=False
        )
    rows = [0, 1, 2] if leaving_at is None else [0, 2]
    for of_stack, expected in zip(found, (whole.hidden_states[3], whole.last_hidden_state), strict=True):
        there = attention[rows]
        torch.testing.assert_close(of_stack[there], expected[rows][there], atol=1e-5, rtol=1e-5)


def test_the_plain_path_says_the_same():
    trunk, top = split(tiny_model("Llama"), 2)
    sampler = Sampler(trunk, clone(top))
    packed, plain = decoded(sampler.start(), 8), decoded(Decoding(sampler.decoders), 8)
    there = texts()[1][[0, 2]]
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one[there], other[there], atol=1e-5, rtol=1e-5)


def test_a_new_decoding_has_the_weights_as_they_are_then():
    model = tiny_model("Llama")
    decoders = [model.get_decoder()]
    before = decoded(LlamaDecoding(decoders))[0]
    for name, parameter in model.named_parameters():
        if "proj" in name or "norm" in name:
            with torch.no_grad():
                parameter.mul_(1.5)
            now = decoded(LlamaDecoding(decoders))[0]
            assert not torch.equal(now, before), name
            before = now
    torch.testing.assert_close(before[0], Stack(model.get_decoder())(*texts()[:2])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("Llama", {}, None),
        ("Llama", {"hidden_act": "gelu"}, "gelu"),
        ("Llama", {"attention_bias": True}, "biases"),
        ("Llama", {"mlp_bias": True}, "biases"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("Mistral", {}, "MistralDecoderLayer"),
        ("Granite", {}, "GraniteDecoderLayer"),
        ("GPT2", {}, "GPT2"),
    ],
)
def test_what_is_packed_and_what_is_not(family: str, changes: dict[str, Any], why: str | None):
    found = obstacle_to_packing([tiny_model(family, **changes).get_decoder()])
    assert found is None if why is None else why in found


def test_adapters_are_not_packed_away():
    model = ActorCritic(plain_model("Llama"), ModelConfig(trainable="lora", dtype="float32"))
    assert "adapter" in model.sampler.obstacle
