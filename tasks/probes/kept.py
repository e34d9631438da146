"""Kept: what alignment cost. Plain text, diversity, length, and the language of the data."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Literal

import numpy as np
import pandas as pd

from tasks.probes.answers import groups, of_texts
from tasks.probes.base import POLICY, REFERENCE, TEST, Asked, Continuation, Figure, Missing, NotMeasured
from tasks.statistics import ngrams, repetitions

PLAIN_TEXT = "plain_text"
EXCERPT = 2000
"""Characters read of a plain text."""
FOREIGN = 0.01
"""A script with less than this share of the prompts' letters is not one of theirs."""
ANSWERS: tuple[tuple[str, str, Literal["higher", "lower"], str], ...] = (
    ("shared_pairs", "word pairs of other answers", "lower", "Share of an answer's word pairs that the answer to "
     "another prompt has, too. Rises when answers become alike."),
    ("repetition", "repeated words", "lower", "Share of an answer's words that occurred in it before. Rises when "
     "answers go round in circles."),
    ("language", "words of the data's language", "higher", "Share of an answer's words that people used in the data. "
     "Falls when the policy leaves their language, or writes no language at all."),
    ("script", "letters of the prompts' scripts", "higher", "Share of an answer's letters that belong to a script "
     "(Latin, Cyrillic, Han, ...) of the prompts."),
)  # fmt: skip
"""Key, name, which way is good, and meaning."""
_WORD = re.compile(r"[^\W\d_]+")


def measure(asked: Asked) -> list[Figure | NotMeasured]:
    return [_plain_text(asked), *_answers(asked)]


def _plain_text(asked: Asked) -> Figure | NotMeasured:
    key, name = "kept.plain_text", "surprise at plain text"
    try:
        texts = [Continuation("", "text", text[:EXCERPT]) for text in asked.items(PLAIN_TEXT)["text"]]
    except Missing as missing:
        return NotMeasured(key, name, str(missing))
    values = {s: np.array([-logprobs.mean() for logprobs in asked.logprobs(s, texts)]) for s in asked.subjects}
    means = {subject: float(x.mean()) for subject, x in values.items()}
    perplexity = {"perplexity": float(np.exp(means[POLICY])), "perplexity_reference": float(np.exp(means[REFERENCE]))}
    return Figure(
        key=key,
        name=name,
        meaning="Mean negative log-probability of a token (nats) of texts that people wrote; its "
        "exponential is the perplexity. A rise says that the policy has forgotten how people write.",
        better="lower",
        values=values,
        unit="nats",
        facts=perplexity | {"perplexity_change": float(np.expm1(means[POLICY] - means[REFERENCE]))},
    )


def _answers(asked: Asked) -> list[Figure | NotMeasured]:
    asking = asked.responses(REFERENCE, TEST).prompts
    together = groups(asked, TEST)
    lengths = {subject: asked.responses(subject, TEST).lengths.astype(np.float64) for subject in asked.subjects}
    measures: dict[str, Callable[[Sequence[str]], np.ndarray]] = {
        "shared_pairs": partial(shared_pairs, asking),
        "repetition": repetitions,
        "language": partial(known_words, _words_of_the_data(asked)),
        "script": partial(familiar_letters, scripts(asking)),
    }
    shares: list[Figure | NotMeasured] = [
        Figure(f"kept.{key}", name, meaning, better, of_texts(asked, TEST, measures[key]), together, unit="share")
        for key, name, better, meaning in ANSWERS
    ]
    meaning = "Tokens an answer. A reward that likes length, or brevity, shows here."
    return [*shares, Figure("kept.length", "length", meaning, "same", lengths, together, unit="tokens")]


def shared_pairs(prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """[N]: share of a text's word pairs that the answer to another prompt has, too; 0 for a text without pairs."""
    pairs = [set(ngrams(text, 2)) for text in texts]
    # Several answers to one prompt are one source of pairs: they may be alike.
    of_prompt: dict[str, set[tuple[str, ...]]] = {}
    for prompt, found in zip(prompts, pairs, strict=True):
        of_prompt.setdefault(prompt, set()).update(found)
    holders = Counter(pair for found in of_prompt.values() for pair in found)
    return np.array([np.mean([holders[pair] > 1 for pair in found]) if found else 0.0 for found in pairs])


def known_words(known: frozenset[str], texts: Sequence[str]) -> np.ndarray:
    """[N]: share of a text's words that are `known`; 1 for a text without words."""
    found = [_words(text) for text in texts]
    return np.array([np.mean([word in known for word in words]) if words else 1.0 for words in found])


def familiar_letters(scripts: frozenset[str], texts: Sequence[str]) -> np.ndarray:
    """[N]: share of a text's letters that belong to `scripts`; 1 for a text without letters."""
    found = [[_script(letter) for letter in text if letter.isalpha()] for text in texts]
    return np.array([np.mean([script in scripts for script in letters]) if letters else 1.0 for letters in found])


def scripts(texts: Iterable[str]) -> frozenset[str]:
    """The scripts that texts are written in, apart from a stray letter."""
    counts = Counter(_script(letter) for text in texts for letter in text if letter.isalpha())
    return frozenset(script for script, count in counts.items() if count >= FOREIGN * counts.total())


@cache
def _script(letter: str) -> str:
    """By the first word of the character's Unicode name, which is how scripts are told apart there."""
    return unicodedata.name(letter, "?").split()[0]


def _words_of_the_data(asked: Asked) -> frozenset[str]:
    """What people wrote: the texts of all pairs."""
    pairs = pd.read_parquet(asked.workspace.pairs, columns=["chosen", "rejected"])
    return frozenset(word for text in pd.concat([pairs["chosen"], pairs["rejected"]]) for word in _words(str(text)))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
