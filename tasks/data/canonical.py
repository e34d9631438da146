"""Feedback as two tables that share nothing: pairs for the reward model and the judge, prompts for PPO."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ppo_core.seeds import derive
from ppo_core.tokens import encode_prompt, encode_response
from tasks.data.formats import Preference, RatedText
from tasks.data.pairing import RatedPair, length_balance, prompt_pairs, rated_groups
from tasks.data.scored import BarePrompt
from tasks.data.splits import asked, components, distinct, normal, share_out, take_exactly
from tasks.data_params import IngestParams, PromptParams, SplitParams
from tasks.errors import DataError

Feedback = Preference | RatedText
Item = Feedback | BarePrompt
Row = dict[str, Any]


class Lengths:
    """Token counts as the policy sees them; each text is encoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[str, str], int] = {}

    def prompt(self, prompt: str, format: str) -> int:
        """Raises ValueError for a conversation that the model's template refuses."""
        if (format, prompt) not in self._known:
            self._known[format, prompt] = len(encode_prompt(self.tokenizer, prompt, format))
        return self._known[format, prompt]

    def response(self, text: str) -> int:
        if ("response", text) not in self._known:
            self._known["response", text] = len(encode_response(self.tokenizer, text))
        return self._known["response", text]


@dataclass(frozen=True)
class Prompt:
    """What the policy answers or continues."""

    format: str
    prompt: str
    source: str
    group: str


def without_duplicates(items: Iterable[Item]) -> list[Item]:
    """The first of each prompt, rated text, and pair in one direction. A contradiction is validation's to judge."""
    return distinct(items, lambda item: (type(item), *texts_of(item)))


def texts_of(item: Item) -> tuple[str, ...]:
    """What ties an item to others: its texts, its prompt, and what a conversation opens with."""
    answers = [item.text] if isinstance(item, RatedText) else []
    if isinstance(item, Preference):
        answers = [item.chosen, item.rejected]
    texts = [*answers, item.prompt]
    if item.format == "chat":
        texts += [turn["content"] for turn in json.loads(item.prompt) if turn["role"] != "system"][:1]
    return tuple(normal(text) for text in texts if text)


def build(
    items: Sequence[Item], params: IngestParams, seed: int, lengths: Lengths, held: Collection[str] = ()
) -> tuple[list[Row], list[Row]]:
    """Rows of the two tables; no prompt is one of `held`. Raises DataError where there are too few for a split."""
    splits = params.splits
    groups = components(items, texts_of)
    # What tells of no preference is no part of what is shared out; a bare prompt goes where feedback on it goes.
    compared = [group for group in groups if _gives_pairs(group)]
    given = share_out(compared, _shares(splits), random.Random(derive(seed, "splits")))
    rest = [group for group in groups if not _gives_pairs(group)]
    openings = random.Random(derive(seed, "openings"))
    prompts = list(_prompts([*given.pop("prompts"), *rest], params.prompts, openings))
    prompts = [prompt for prompt in prompts if asked(prompt.prompt, prompt.format) not in held]
    short = [prompt for prompt in prompts if lengths.prompt(prompt.prompt, prompt.format) <= params.max_prompt_tokens]
    prompt_rows = [_prompt_row(prompt, split, lengths) for split, prompt in _split_prompts(short, splits, seed)]
    pair_rows: list[Row] = []
    for split, parts in given.items():
        rows = [
            *_stated_pairs(parts, split, lengths),
            *_rated_pairs(parts, split, params, seed, lengths),
            *_reply_pairs(parts, split, params, seed, lengths),
        ]
        if not rows:
            raise DataError(f"too few texts: no pairs for {split}", "ingest.splits", "add data, or change the shares")
        pair_rows += rows
    return pair_rows, prompt_rows


def opening(text: str, params: PromptParams, draw: random.Random) -> str | None:
    """The first few words of a text, or None if nothing would be left to continue."""
    words = list(re.finditer(r"\S+", text))
    most = min(params.max_words, len(words) - 1)
    if most < params.min_words:
        return None
    return text[: words[draw.randint(params.min_words, most) - 1].end()]


def _gives_pairs(group: Sequence[Item]) -> bool:
    """Whether there is something to compare: a pair, a text that stands for itself, two replies to one prompt."""
    replies = Counter((item.source, item.prompt) for item in group if isinstance(item, RatedText) and item.prompt)
    stated = any(isinstance(item, Preference) or (isinstance(item, RatedText) and not item.prompt) for item in group)
    return stated or max(replies.values(), default=0) > 1


def _shares(splits: SplitParams) -> dict[str, float]:
    kept = 1 - splits.held_out
    return {
        "reward_train": splits.reward * kept,
        "reward_eval": splits.reward * splits.held_out,
        "judge_train": splits.judge * kept,
        "judge_eval": splits.judge * splits.held_out,
        "prompts": 1 - splits.reward - splits.judge,
    }


def _prompts(groups: Iterable[Sequence[Item]], params: PromptParams, draw: random.Random) -> Iterator[Prompt]:
    """The prompts there are; the opening of the text, or of the preferred one, where there is none."""
    for group in groups:
        name = digest(*texts_of(group[0]))
        for item in group:
            if isinstance(item, BarePrompt) or item.prompt:
                yield Prompt(item.format, item.prompt, item.source, name)
            elif start := opening(item.text if isinstance(item, RatedText) else item.chosen, params, draw):
                yield Prompt("text", start, item.source, name)


def _split_prompts(prompts: Iterable[Prompt], splits: SplitParams, seed: int) -> Iterator[tuple[str, Prompt]]:
    """Different prompts with their split. `dev` and `test` have exactly their number, and no group in common."""
    unlike = distinct(prompts, lambda prompt: (prompt.format, normal(prompt.prompt)))
    groups = [list(group) for _, group in groupby(unlike, key=lambda prompt: prompt.group)]
    groups = random.Random(derive(seed, "prompts")).sample(groups, len(groups))
    wanted = {"test": splits.test, "dev": splits.dev}
    given = take_exactly(groups, wanted, rest="ppo")
    counts = {split: sum(map(len, parts)) for split, parts in given.items()}
    if any(counts[split] != n for split, n in wanted.items()) or not counts["ppo"]:
        raise DataError(
            f"too few texts: {len(unlike)} different prompts give {counts}, needed are {wanted} and some for ppo",
            "ingest.splits",
            "add data, lower dev and test, or lower the shares of reward and judge",
        )
    for split in ("ppo", *wanted):
        yield from ((split, prompt) for group in given[split] for prompt in group)


def _stated_pairs(groups: Iterable[Sequence[Item]], split: str, lengths: Lengths) -> Iterator[Row]:
    for group in groups:
        name = digest(*texts_of(group[0]))
        yield from (_pair_row(item, name, split, lengths) for item in group if isinstance(item, Preference))


def _rated_pairs(
    groups: Iterable[Sequence[Item]], split: str, params: IngestParams, seed: int, lengths: Lengths
) -> Iterator[Row]:
    """Pairs of rated texts. Those of different sources are not compared: their scales may differ."""
    rated = [item for group in groups for item in group if isinstance(item, RatedText) and not item.prompt]
    for source in dict.fromkeys(item.source for item in rated):
        texts = [item for item in rated if item.source == source]
        draw = random.Random(derive(seed, "pairing", split, source))
        for pairs in rated_groups(texts, params.pairing.group_size, params.pairing.min_gap, draw):
            name = digest(*(pair.chosen.text for pair in pairs))
            yield from (_pair_row(_preference(pair), name, split, lengths) for pair in pairs)


def _reply_pairs(
    groups: Iterable[Sequence[Item]], split: str, params: IngestParams, seed: int, lengths: Lengths
) -> Iterator[Row]:
    """Pairs of scored replies to the same prompt, from the same source; prompts in random order, so that they mix."""
    draw = random.Random(derive(seed, "reply pairs", split))
    runs: list[tuple[str, list[RatedPair]]] = []
    for group in groups:
        name = digest(*texts_of(group[0]))
        replies = [item for item in group if isinstance(item, RatedText) and item.prompt]
        for question in dict.fromkeys((item.source, item.prompt) for item in replies):
            same = [item for item in replies if (item.source, item.prompt) == question]
            runs += [(name, pairs) for pairs in prompt_pairs(same, params.pairing.min_gap)]
    pairs = [(name, pair) for name, run in draw.sample(runs, len(runs)) for pair in run]
    if params.pairing.balance_length:
        ratios = [lengths.response(pair.chosen.text) / lengths.response(pair.rejected.text) for _, pair in pairs]
        pairs = [pairs[i] for i in length_balance(ratios, draw)]
    yield from (_pair_row(_preference(pair), name, split, lengths) for name, pair in pairs)


def _preference(pair: RatedPair) -> Preference:
    better, worse = pair.chosen, pair.rejected
    return Preference(
        better.format, better.prompt, better.text, worse.text, pair.margin, pair.target, better.row, better.source,
        better.reward,
    )  # fmt: skip


def _pair_row(pair: Preference, group: str, split: str, lengths: Lengths) -> Row:
    before = lengths.prompt(pair.prompt, pair.format)
    return {
        "pair_id": digest(pair.format, pair.prompt, pair.chosen, pair.rejected),
        "format": pair.format,
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "margin": float(pair.margin),
        "target": float(pair.target),
        "chosen_tokens": before + lengths.response(pair.chosen),
        "rejected_tokens": before + lengths.response(pair.rejected),
        "source": pair.source,
        "reward": pair.reward,
        "group": group,
        "split": split,
    }


def _prompt_row(prompt: Prompt, split: str, lengths: Lengths) -> Row:
    return {
        "prompt_id": digest(prompt.format, prompt.prompt),
        "format": prompt.format,
        "prompt": prompt.prompt,
        "tokens": lengths.prompt(prompt.prompt, prompt.format),
        "source": prompt.source,
        "group": prompt.group,
        "split": split,
    }


def digest(*parts: str) -> str:
    """A short name for what the parts say."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
