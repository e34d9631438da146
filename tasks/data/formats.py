"""Formats of human feedback, each row checked against its schema; all bad rows of a file in one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tasks.data.rows import BadRows, parse_json, read_rows, read_tabs


@dataclass(frozen=True)
class Preference:
    """Two answers, and which one people preferred."""

    format: Literal["text", "chat"]
    prompt: str
    """Plain text, "" for none; for chat a JSON array of {"role", "content"}."""
    chosen: str
    rejected: str
    margin: float
    target: float
    """Probability that a person prefers `chosen`."""
    row: int
    source: str = ""
    reward: str = ""
    """Which of several trained rewards learns from it; "": each."""


@dataclass(frozen=True)
class RatedText:
    """A text and what single people thought of it: more is better. With a prompt, it is a reply to that."""

    text: str
    ratings: tuple[float, ...]
    row: int
    source: str = ""
    format: Literal["text", "chat"] = "text"
    prompt: str = ""
    """As in `Preference`."""
    reward: str = ""

    @property
    def mean(self) -> float:
        return sum(self.ratings) / len(self.ratings)


def read_feedback(path: Path, format: str, bad: BadRows, comment: str = "") -> Iterator[Preference | RatedText]:
    """The good rows of a JSONL, CSV or Parquet file in one of the formats here; the others go to `bad`."""
    schema = _SCHEMAS[format]
    for number, row in read_rows(path, bad, schema.model_fields, _JSON_COLUMNS[format], comment):
        try:
            # A null is a field that is not there.
            yield schema.model_validate({k: v for k, v in row.items() if v is not None}).parsed(number)
        except ValidationError as error:
            report(error, number, bad)


def read_rated_tables(texts: Path, bad: BadRows, ratings: Path, bad_ratings: BadRows) -> Iterator[RatedText]:
    """Tab-separated (id, mean, text) joined by id with (id, mean, deviation, [ratings])."""
    known: dict[str, list[float]] = {}
    for number, (key, _, _, cell) in read_tabs(ratings, 4, bad_ratings):
        try:
            found = _NUMBERS.validate_python(parse_json(cell))
        except ValidationError as error:
            report(error, number, bad_ratings)
        except ValueError as error:
            bad_ratings.add(number, f"is no list of numbers: {error}", "write [1, 2, 3]", "ratings")
        else:
            if known.setdefault(key, found) is not found:
                bad_ratings.add(number, f"rates the id {key!r} again", "leave one of the two out", "id")
    for number, (key, _, text) in read_tabs(texts, 3, bad):
        if key not in known:
            bad.add(number, f"has no ratings under the id {key!r}", f"add them to {bad_ratings.label}", "id")
            continue
        try:
            yield _Rated.model_validate({"text": text, "ratings": known[key]}).parsed(number)
        except ValidationError as error:
            report(error, number, bad)


def _readable(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("holds a lone surrogate, which is no character")
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, AfterValidator(_readable)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
"""A rating or a margin. Far beyond any scale, sums and differences would overflow."""
Numbers = Annotated[list[Number], Field(min_length=1)]
_NUMBERS = TypeAdapter(Numbers, config=ConfigDict(strict=True))


class Schema(BaseModel):
    # Strict: "3" is no number. Fields of other names are the user's own business.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Rated(Schema):
    text: Text
    ratings: Numbers

    def parsed(self, row: int) -> RatedText:
        return RatedText(self.text.strip(), tuple(self.ratings), row)


class Message(Schema):
    role: Literal["system", "user", "assistant"]
    content: Text


class _Pair(Schema):
    margin: Annotated[Number, Field(ge=0)] = 1.0
    target: Annotated[Number, Field(ge=0, le=1)] = 1.0


Prompt = Annotated[
    Annotated[str, AfterValidator(lambda text: text and _readable(text)), Tag("as text")]
    | Annotated[list[Message], Field(min_length=1), Tag("as messages")],
    Discriminator(lambda value: "as messages" if isinstance(value, list) else "as text"),
]


class _Preference(_Pair):
    prompt: Prompt = ""
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _differ(self) -> Self:
        _refuse_same(self.chosen, self.rejected)
        return self

    def parsed(self, row: int) -> Preference:
        if isinstance(self.prompt, str):
            return Preference("text", self.prompt, self.chosen, self.rejected, self.margin, self.target, row)
        return Preference("chat", as_json(self.prompt), self.chosen, self.rejected, self.margin, self.target, row)


class _Messages(_Pair):
    prompt: list[Message] = []
    chosen: Annotated[list[Message], Field(min_length=1)]
    rejected: Annotated[list[Message], Field(min_length=1)]

    @model_validator(mode="after")
    def _differ_in_the_last_reply(self) -> Self:
        if {self.chosen[-1].role, self.rejected[-1].role} != {"assistant"}:
            raise ValueError("a conversation does not end with a reply of the assistant")
        if self.chosen[:-1] != self.rejected[:-1]:
            raise ValueError("the conversations differ before their last message")
        if not self.prompt and len(self.chosen) == 1:
            raise ValueError("there is no message before the reply")
        _refuse_same(self.chosen[-1].content, self.rejected[-1].content)
        return self

    def parsed(self, row: int) -> Preference:
        prompt = as_json([*self.prompt, *self.chosen[:-1]])
        chosen, rejected = self.chosen[-1].content, self.rejected[-1].content
        return Preference("chat", prompt, chosen, rejected, self.margin, self.target, row)


class _Dialogues(Schema):
    """hh-rlhf's conversations, each one text."""

    chosen: Text
    rejected: Text

    def parsed(self, row: int) -> Preference:
        conversations = {"chosen": _turns(self.chosen), "rejected": _turns(self.rejected)}
        return _Messages.model_validate(conversations).parsed(row)


_SCHEMAS: dict[str, type[_Rated | _Preference | _Messages | _Dialogues]] = {
    "ratings": _Rated,
    "preferences": _Preference,
    "messages": _Messages,
    "hh": _Dialogues,
}
# Cells of a CSV that are numbers or arrays.
_JSON_COLUMNS = {
    "ratings": ("ratings",),
    "preferences": ("margin", "target"),
    "messages": ("prompt", "chosen", "rejected", "margin", "target"),
    "hh": (),
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _turns(text: str) -> list[dict[str, str]]:
    """Messages of a text with `Human:` and `Assistant:` turns; what stands before the first is a turn of no role."""
    before, *parts = _TURN.split(text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2], strict=True)]
    return [{"role": "none", "content": before}, *turns] if before else turns


def _refuse_same(chosen: str, rejected: str) -> None:
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same")


def as_json(messages: list[Message]) -> str:
    """A conversation as the canonical data has it."""
    return json.dumps([message.model_dump() for message in messages], ensure_ascii=False)


def report(error: ValidationError, row: int, bad: BadRows, names: Mapping[str, str] | None = None) -> None:
    """Everything that is wrong with a row. `names` are the user's own for fields of the schema."""
    for detail in error.errors(include_url=False):
        # The tags of `Prompt` are no part of the user's file.
        parts = [str(part) for part in detail["loc"] if part not in ("as text", "as messages")]
        column = ".".join(filter(None, ((names or {}).get(part, part) for part in parts)))
        what = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
        bad.add(row, what, _MENDS.get(detail["type"], "mend the row or leave it out"), column)


_MENDS = {
    "missing": "add the field",
    "string_type": "write it as text",
    "list_type": "write a list",
    "float_type": "write a number",
    "finite_number": "write a finite number",
    "string_pattern_mismatch": "use letters, digits, spaces and _ . - alone, 80 at most",
}
