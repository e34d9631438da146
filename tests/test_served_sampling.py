"""A served model samples from the law that was trained: the same sets, the same ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from mlflow.exceptions import MlflowException

from ppo_core.config import SamplingConfig
from ppo_core.law import SamplingLaw
from tasks.registration.cycle_model import Law, PolicyModel
from tasks.registration.registry import _signature

STOPS = [2, 9]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> PolicyModel:
    model = PolicyModel()
    folder = tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "policy")
    artifacts = {"tokens": str(tiny.REPOSITORY / "ppo_core" / "tokens.py"), "checkpoint": str(folder)}
    model.load_context(SimpleNamespace(artifacts=artifacts))
    return model


def ask(model: PolicyModel, texts: list[str], **asked: Any) -> list[str]:
    """What it answers under the defaults that a training without restrictions leaves, but for `asked`."""
    defaults = {spec.name: spec.default for spec in _signature(SamplingConfig(max_new_tokens=12)).params}
    return model.predict(None, pd.DataFrame({"prompt": texts}), defaults | {"seed": 1} | asked)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 900},
        {"top_p": 0.5, "temperature": 1.5},
        {"top_k": 20, "top_p": 0.8, "min_new_tokens": 3, "temperature": 0.7},
    ],
)
def test_it_is_the_law_of_training(asked: dict[str, Any]) -> None:
    logits = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(4))
    config = SamplingConfig(max_new_tokens=8, **asked)
    trained = SamplingLaw(config, STOPS)
    named = {spec.name: spec.default for spec in _signature(config).params}
    for name in ("seed", "stop_tokens"):
        del named[name]
    law = Law(**named, stops=STOPS)
    for t in (0, 2, 3):
        expected = (trained.at_step(logits, t) / config.temperature).softmax(dim=-1)
        found = law.probabilities(logits, t)
        torch.testing.assert_close(found / found.sum(dim=-1, keepdim=True), expected)


def test_a_stop_string_ends_a_response_and_stays(served: PolicyModel) -> None:
    whole, other = ask(served, ["the film", "her story"])
    middle = next(pair for i in range(4, len(whole)) if (pair := whole[i : i + 2]) not in other)
    stopped, beside = ask(served, ["the film", "her story"], stop_strings=[middle])
    assert whole.startswith(stopped)
    assert middle in stopped
    assert len(stopped) < len(whole)
    assert beside == other, "the neighbour goes on as if nothing had happened"


def test_a_stop_token_ends_a_response_and_is_no_text(served: PolicyModel) -> None:
    (whole,) = ask(served, ["the film"])
    word = next(token for token in served.tokenizer.tokenize(whole) if token.isalpha() and len(token) > 3)
    before, _, _ = whole.partition(served.tokenizer.convert_tokens_to_string([word]))
    assert ask(served, ["the film"], stop_tokens=[word]) == [before]


def test_a_response_cannot_end_before_its_least_length(served: PolicyModel) -> None:
    every = list(served.tokenizer.get_vocab())
    likely = every[: len(every) // 2]
    assert "" in ask(served, ["the film"] * 8, stop_tokens=likely)
    (longer,) = ask(served, ["the film"], stop_tokens=likely, min_new_tokens=5)
    assert len(served.tokenizer.tokenize(longer)) >= 4


def test_the_likeliest_token_is_taken_among_those_that_may_come(served: PolicyModel) -> None:
    (greedy,) = ask(served, ["the film"], temperature=0.0, max_new_tokens=1)
    (token,) = served.tokenizer.tokenize(greedy)
    (other,) = ask(served, ["the film"], temperature=0.0, max_new_tokens=1, stop_tokens=[token], min_new_tokens=1)
    assert other not in ("", greedy)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, r"top_p 0\.0"),
        ({"stop_tokens": ["no such token"]}, "are no tokens of this model"),
        ({"stop_strings": [""]}, "an empty stop string"),
    ],
)
def test_a_law_that_cannot_be_is_refused(served: PolicyModel, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(MlflowException, match=why):
        ask(served, ["the film"], **asked)
