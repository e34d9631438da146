"""What the probes of the evaluation ask: one dataclass a kind of item, and how files of each kind are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tasks.data.formats import Number, Schema, Text, report
from tasks.data.rows import BadRows, Row, objects, read_json, read_lines, read_rows, read_tabs
from tasks.data.scored import Prompted, as_prompt, present, read_prompts, read_replies
from tasks.data.sources import Fetched
from tasks.data_params import ProbeSource
from tasks.errors import DataError

Form = Literal["text", "chat"]


@dataclass(frozen=True)
class Ask:
    """A prompt that models reply to."""

    format: Form
    prompt: str
    """As in data/canonical/prompts.parquet."""
    row: int


@dataclass(frozen=True)
class Labelled:
    """A reply and what people thought of it."""

    format: Form
    prompt: str
    response: str
    label: float
    """0 to 1, the mean of the raters."""
    row: int


@dataclass(frozen=True)
class Choices:
    """A question with right and wrong answers; of a comparison, the preferred answer is the right one."""

    format: Form
    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    subset: str
    canary: str
    """A mark by which training data that hold the benchmark can be found: it stays with the items."""
    row: int


@dataclass(frozen=True)
class Statements:
    """Statements of fact: a true one, a false one, or one of each that belong together."""

    right: str
    wrong: str
    row: int


@dataclass(frozen=True)
class Plain:
    """A text by people."""

    text: str
    row: int


Item = Ask | Labelled | Choices | Statements | Plain


def read_items(name: str, file: Fetched, source: ProbeSource, bad: BadRows) -> Iterator[Item]:
    """The good items of a file for the probe `name`; the others go to `bad`. Raises DataError where all is in vain."""
    if name in ("harm_labels", "refusal_labels"):
        yield from _labelled(file.path, source, bad)
    elif name in ("hhh", "truthful"):
        read = _bigbench if source.format == "bigbench" else _choices
        yield from read(file, source, bad)
    elif name == "statements":
        yield from _statements(file.path, source, bad)
    elif name == "plain_text":
        yield from _plain(file.path, source, bad)
    else:
        for prompt in read_prompts(file.path, source, bad):
            yield Ask(prompt.format, prompt.prompt, prompt.row)


_Texts = Annotated[
    list[Text], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


SUBSET = r"^[\w .-]{0,80}$"
"""It becomes part of a metric's name, which MLflow restricts."""


class _Question(Prompted):
    right: _Texts
    wrong: _Texts
    subset: Annotated[str, Field(pattern=SUBSET)] = ""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if both := {text.strip() for text in self.right} & {text.strip() for text in self.wrong}:
            raise ValueError(f"calls the same answer right and wrong: {min(both)!r}")
        return self


class _Example(Schema):
    """Of a task.json."""

    input: Text
    target_scores: dict[Text, Number]

    @model_validator(mode="after")
    def _prefers(self) -> Self:
        if len(set(self.target_scores.values())) < 2:
            raise ValueError("target_scores prefer no answer to another")
        return self


class _Statements(Schema):
    right: Text | None = None
    wrong: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.right is None and self.wrong is None:
            raise ValueError("holds neither a true statement nor a false one")
        return self


class _Plain(Schema):
    text: Text


def _labelled(path: Path, source: ProbeSource, bad: BadRows) -> Iterator[Labelled]:
    for reply in read_replies(path, source, bad):
        if 0 <= reply.mean <= 1:
            yield Labelled(reply.format, reply.prompt, reply.text, reply.mean, reply.row)
        else:
            bad.add(reply.row, f"is scored {reply.mean:g}, must be 0 to 1", "bring the scores to that scale", "scores")


def _choices(file: Fetched, source: ProbeSource, bad: BadRows) -> Iterator[Choices]:
    columns = source.columns
    names = {"prompt": columns.prompt, "right": columns.right, "wrong": columns.wrong, "subset": "subset"}
    lists = (columns.right, columns.wrong)
    for number, row in read_rows(file.path, bad, set(names.values()), lists, source.comment):
        question = _checked(_Question, present(row, **names), number, bad, names)
        if question is not None:
            form, prompt = as_prompt(question.prompt, source.chat)
            yield Choices(form, prompt, tuple(question.right), tuple(question.wrong), question.subset, "", number)


def _bigbench(file: Fetched, source: ProbeSource, bad: BadRows) -> Iterator[Choices]:
    """A task of BIG-bench (Srivastava et al. 2022); the answers with the highest score are the right ones."""
    task = read_json(file.path, bad.label)
    if not isinstance(task, dict):
        raise DataError("is no task: it holds no object", bad.label, "use the task.json of a task")
    place = PurePosixPath(file.label)
    subset = place.parent.name if place.stem == "task" else place.stem
    if not re.fullmatch(SUBSET, subset):
        mend = "rename its folder or file: letters, digits, spaces and _ . - alone, 80 at most"
        raise DataError(f"has the subset {subset!r}, which cannot name a figure", bad.label, mend)
    for number, row in objects(task.get("examples"), bad, "examples"):
        example = _checked(_Example, row, number, bad, {})
        if example is not None:
            form, prompt = as_prompt(example.input, source.chat)
            best = max(example.target_scores.values())
            right = tuple(text for text, score in example.target_scores.items() if score == best)
            wrong = tuple(text for text, score in example.target_scores.items() if score < best)
            yield Choices(form, prompt, right, wrong, subset, str(task.get("canary", "")), number)


def _statements(path: Path, source: ProbeSource, bad: BadRows) -> Iterator[Statements]:
    names = {"right": source.columns.right, "wrong": source.columns.wrong}
    for number, row in read_rows(path, bad, set(names.values()), comment=source.comment):
        found = _checked(_Statements, present(row, **names), number, bad, names)
        if found is not None:
            yield Statements(found.right or "", found.wrong or "", number)


def _plain(path: Path, source: ProbeSource, bad: BadRows) -> Iterator[Plain]:
    name = source.columns.text
    rows: Iterator[tuple[int, Row]]
    if source.format == "rated_texts":
        rows = ((number, {name: text}) for number, (_, _, text) in read_tabs(path, 3, bad))
    elif path.suffix == ".txt":
        rows = ((number, {name: line}) for number, line in read_lines(path, bad))
    else:
        rows = read_rows(path, bad, {name}, comment=source.comment)
    for number, row in rows:
        found = _checked(_Plain, present(row, text=name), number, bad, {"text": name})
        if found is not None:
            yield Plain(found.text.strip(), number)


Checked = TypeVar("Checked", bound=Schema)


def _checked(schema: type[Checked], row: Row, number: int, bad: BadRows, names: Mapping[str, str]) -> Checked | None:
    """The row if it is good; None, and all that is wrong with it reported, if not."""
    try:
        return schema.model_validate(row)
    except ValidationError as error:
        report(error, number, bad, names)
        return None
