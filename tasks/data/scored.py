"""Formats whose columns the user names: replies with people's scores, and prompts without any feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, field_validator

from tasks.data.formats import Message, Number, Prompt, RatedText, Schema, Text, as_json, report
from tasks.data.rows import BadRows, Row, read_lines, read_rows
from tasks.data_params import TableSource


@dataclass(frozen=True)
class BarePrompt:
    """A prompt that nobody has given feedback on."""

    format: Literal["text", "chat"]
    prompt: str
    """As in `Preference`."""
    row: int
    source: str = ""


class Prompted(Schema):
    """A row that asks something."""

    prompt: Prompt

    @field_validator("prompt")
    @classmethod
    def _said(cls, prompt: Prompt) -> Prompt:
        if not prompt:
            raise ValueError("is empty")
        return prompt


class _Reply(Prompted):
    response: Text
    scores: dict[str, Number]

    @field_validator("scores")
    @classmethod
    def _some(cls, scores: dict[str, float]) -> dict[str, float]:
        if not scores:
            raise ValueError("has no score in any of the columns that `columns.scores` names")
        return scores


def as_prompt(said: Prompt, chat: bool) -> tuple[Literal["text", "chat"], str]:
    """Format and prompt as the canonical data has them. Of a `chat`, a text is the first message."""
    if isinstance(said, str) and not chat:
        return "text", said
    return "chat", as_json([Message(role="user", content=said.strip())] if isinstance(said, str) else said)


def read_replies(path: Path, source: TableSource, bad: BadRows, sign: int = 1) -> Iterator[RatedText]:
    """The good rows of a file of scored replies, each score times `sign`; the others go to `bad`."""
    columns = source.columns
    names = {"prompt": columns.prompt, "response": columns.response, "scores": ""}
    for number, row in read_rows(
        path, bad, {columns.prompt, columns.response, *columns.scores}, columns.scores, source.comment
    ):
        scores = {name: row[name] for name in columns.scores if row.get(name) is not None}
        fields = present(row, prompt=columns.prompt, response=columns.response) | {"scores": scores}
        try:
            reply = _Reply.model_validate(fields)
        except ValidationError as error:
            report(error, number, bad, names)
            continue
        form, prompt = as_prompt(reply.prompt, source.chat)
        text = reply.response.strip() if form == "chat" else reply.response
        ratings = tuple(sign * score for score in reply.scores.values())
        yield RatedText(text, ratings, number, format=form, prompt=prompt)


def read_prompts(path: Path, source: TableSource, bad: BadRows) -> Iterator[BarePrompt]:
    """The good prompts of a file: one a line of a .txt, else one a row; the others go to `bad`."""
    name = source.columns.prompt
    if path.suffix == ".txt":
        rows: Iterator[tuple[int, Row]] = ((number, {name: line}) for number, line in read_lines(path, bad))
    else:
        rows = read_rows(path, bad, {name}, comment=source.comment)
    for number, row in rows:
        try:
            form, prompt = as_prompt(Prompted.model_validate(present(row, prompt=name)).prompt, source.chat)
        except ValidationError as error:
            report(error, number, bad, {"prompt": name})
        else:
            yield BarePrompt(form, prompt, number)


def present(row: Row, **columns: str) -> Row:
    """The row under the schema's names. A null is a field that is not there."""
    return {field: row[name] for field, name in columns.items() if row.get(name) is not None}
