"""The report of the evaluate stage: one page to decide from, and its Markdown twin.

Both are written from the same sections, so that neither says more than the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ppo_core.seeds import derive
from tasks import origin, pages, plots
from tasks.axes import Axes
from tasks.params import Params
from tasks.responses import Responses
from tasks.workspace import Workspace

TITLE = "Evaluation"
LEAD = (
    "The aligned model and the one it started from answer the same test prompts with the same seeds. The reward model, "
    "which training maximised, scores the answers, and so does the judge: another model, fitted to people's ratings of "
    "other texts, which training never asks."
)
EXCERPT = 600
"""Characters of a text that the report shows."""

PREFERENCE = (
    ("judge_win_rate", "judge win rate", "Share of prompts where the judge scores the aligned model's answer higher; "
     "a tie counts half. 0.5 is no difference."),
    ("judge_gain", "judge gain", "Mean rise of the judge's score, in standard deviations of human-written text."),
    ("reward_gain", "reward gain", "The same by the reward model. Training maximised it, so alone it proves little."),
    ("judge_share", "share confirmed", "Judge gain over reward gain: what is left of the gain in a second opinion. "
     "Near 0, the reward model is being gamed. 0 too where there is no reward gain."),
    ("reward_win_rate", "reward win rate", "As the judge win rate, by the reward model."),
    ("kl", "KL to the reference", "Nats a response: mean over answers of the summed log-probability ratio between "
     "aligned model and reference. How far the model moved for its gain."),
)  # fmt: skip
"""Key, name and meaning of the figures that have an interval."""
LANGUAGE = (
    ("distinct_1", "distinct-1", "Different words over all words, in all answers together."),
    ("distinct_2", "distinct-2", "The same of word pairs. Falls when answers become alike."),
    ("distinct_3", "distinct-3", "The same of word triples."),
    ("repetition", "repetition", "Share of an answer's words that occurred in it before; mean over answers."),
    ("repetition_3", "repeated triples", "The same of word triples: rarer, hence noisier."),
    ("perplexity", "perplexity", "How surprising the answers are to the reference: exp of the mean negative "
     "log-probability a token. Far lower: the model says what is safe. Far higher: it leaves the language."),
    ("entropy", "entropy", "Nats a token, of the law that the model samples from. Near 0, one answer is left."),
    ("length", "length", "Tokens an answer."),
    ("ended_rate", "ended by itself", "Share of answers that end before they are cut off."),
)  # fmt: skip
"""Key, name and meaning of the figures that stand beside the reference's own."""
PICTURES = {
    "curves": "Training by cycle, on the dev prompts. Cycle 0 is the reference; the grey band marks the cycle kept.",
    "overoptimisation": "What the gain cost: each dot is a cycle. Where the judge's curve bends down while the reward "
    "model's rises, further training only games the reward.",
    "language": "Whether language stays language: each curve is 1 where the model writes as the reference does.",
    "scores": "All answers to the test prompts, by score; dashed lines are means. 0 is the mean human-written text.",
}

ENDINGS = {
    "cycles": "all cycles that were asked for",
    "target": "the alignment target reached",
    "kl_budget": "the KL budget spent",
}

Table = tuple[Sequence[str], list[list[object]]]


@dataclass(frozen=True)
class Evaluation:
    """Everything that the report tells of."""

    metrics: dict[str, Any]
    ppo: dict[str, Any]
    """metrics/ppo.json"""
    cycles: pd.DataFrame
    """plots/cycles.csv"""
    samples: pd.DataFrame
    """reports/samples.parquet"""
    policy: Responses
    reference: Responses
    axes: Axes = Axes()
    inspections: Sequence[Markup] = ()
    """Blocks of the section *Token by token*, ready for the page; the Markdown points to them."""


@dataclass(frozen=True)
class Section:
    """A part of the report; what it has stands in this order."""

    title: str
    text: str = ""
    table: Table | None = None
    facts: dict[str, str] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()


def write(folder: Path, evaluation: Evaluation, params: Params, workspace: Workspace) -> None:
    """Write report.html, report.md and the pictures."""
    drawn = _pictures(evaluation, params)
    for name, picture in drawn.items():
        (folder / f"{name}.svg").write_bytes(pages.svg(picture))
    drawn["curves"].savefig(folder / "curves.png", dpi=160)
    figures = _key_figures(evaluation.metrics, params)
    opening = verdict(evaluation.metrics)
    sections = [*_results(evaluation), *_examples(evaluation.samples, params), *_lineage(evaluation, params, workspace)]
    blocks = [pages.verdict(*opening), pages.key_figures(figures)]
    blocks += [block for section in sections for block in _html(section, drawn)]
    (folder / "report.html").write_text(pages.page(TITLE, LEAD, blocks), encoding="utf-8")
    head = [f"**{'✓' if opening[0] else '✗'} {pages.markdown_text(opening[1])}**"]
    head += [pages.markdown_table(["", "", ""], [list(figure) for figure in figures])]
    whole = [f"# {TITLE}", LEAD, *head, *(_markdown(section) for section in sections)]
    (folder / "report.md").write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def verdict(metrics: dict[str, Any]) -> tuple[bool, str]:
    """Whether the judge sees an improvement that chance does not explain, and the result in a few sentences."""
    rate, low, high = (metrics[f"judge_win_rate{end}"] for end in ("", "_low", "_high"))
    text = (
        f"Of {metrics['n']:,} test prompts the judge prefers the aligned model in {_percent(rate)} "
        f"[{_percent(low)}, {_percent(high)}]"
    )
    if low <= 0.5:
        text += ", and so prefers the reference" if high < 0.5 else ", which may be chance"
    text += (
        f". The reward model sees a gain of {_sd(metrics['reward_gain'])}, "
        f"the judge of {_sd(metrics['judge_gain'])}{_confirmation(metrics)}. "
        f"KL to the reference: {metrics['kl']:.1f} nats."
    )
    if _gains(metrics) and metrics["judge_gain_low"] <= 0:
        text += " The judge does not confirm what the reward model sees: the reward is being gamed."
    return low > 0.5 and metrics["judge_gain_low"] > 0, text


def _confirmation(metrics: dict[str, Any]) -> str:
    return f": it confirms {_percent(metrics['judge_share'])}" if _gains(metrics) else ""


def _gains(metrics: dict[str, Any]) -> bool:
    """Whether the reward model sees a gain for certain; where it does not, the share of it means nothing."""
    return bool(metrics["reward_gain_low"] > 0)


def _key_figures(metrics: dict[str, Any], params: Params) -> list[tuple[str, object, str]]:
    def between(key: str, show: Any) -> str:
        return f"interval {show(metrics[f'{key}_low'])} to {show(metrics[f'{key}_high'])}"

    return [
        ("Judge win rate", _percent(metrics["judge_win_rate"]), between("judge_win_rate", _percent)),
        ("Judge gain", _sd(metrics["judge_gain"]), between("judge_gain", "{:+.2f}".format)),
        ("Reward gain", _sd(metrics["reward_gain"]), between("reward_gain", "{:+.2f}".format)),
        ("Judge confirms", _percent(metrics["judge_share"]), between("judge_share", _percent))
        if _gains(metrics)
        else ("Judge confirms", None, "there is no clear reward gain"),
        ("KL to the reference", f"{metrics['kl']:.1f} nats", f"the budget is {params.ppo.kl_budget:g}"),
    ]


def _pictures(evaluation: Evaluation, params: Params) -> dict[str, Figure]:
    cycles, budget = evaluation.cycles, params.ppo.kl_budget
    return {
        "curves": plots.cycles_figure(cycles, budget, evaluation.ppo["result_cycle"]),
        "overoptimisation": plots.overoptimisation_figure(cycles, budget),
        "language": plots.language_figure(cycles),
        "scores": plots.scores_figure(evaluation.policy, evaluation.reference),
    }


def _results(evaluation: Evaluation) -> list[Section]:
    metrics, ppo = evaluation.metrics, evaluation.ppo
    course = (
        f"Training maximised {ppo['maximised']}. It ended after cycle {ppo['cycles']}, with "
        f"{ENDINGS[ppo['stopped_by']]}. "
        f"Cycle {ppo['result_cycle']} is the result."
    )
    repeated = (
        f"The same answers, whatever anyone thinks of them. Repetition differs by "
        f"{_difference(metrics, 'repetition')}, repeated triples by {_difference(metrics, 'repetition_3')}: "
        "chance where the interval holds 0."
    )
    preference: list[list[object]] = [
        [name, metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"], meaning]
        for key, name, meaning in PREFERENCE
    ]
    language: list[list[object]] = [
        [name, before, after, 100 * (after / before - 1) if before else None, meaning]
        for key, name, meaning in LANGUAGE
        for before, after in [(metrics[f"{key}_reference"], metrics[key])]
    ]
    intervals = f"{metrics['n']:,} test prompts; low and high bound the figure at 95 % (paired bootstrap over prompts)."
    return [
        Section(
            "Is it better?", intervals, (["figure", "value", "low", "high", "meaning"], preference), {}, ("scores",)
        ),
        Section("How it got there", course, pictures=("curves", "overoptimisation", "language")),
        Section(
            "Is it still language?", repeated, (["figure", "reference", "aligned", "change (%)", "meaning"], language)
        ),
    ]


def _examples(samples: pd.DataFrame, params: Params) -> list[Section]:
    """Answers side by side: where the judge sees most gained, most lost, and drawn blindly."""
    count = min(params.evaluate.samples, len(samples))
    extreme = count // 3
    gain = (samples["judge_policy"] - samples["judge_reference"]).sort_values(ascending=False, kind="stable")
    draw = np.random.default_rng(derive(params.seed, "evaluate", "samples"))
    blind = draw.choice(len(samples), count - 2 * extreme, replace=False)
    sections = [
        Section("Answers drawn at random", "All are in reports/samples.parquet.", _answers(samples.iloc[blind]))
    ]
    if extreme:
        sections += [
            Section("Largest gains by the judge", table=_answers(samples.loc[gain.index[:extreme]])),
            Section("Largest losses by the judge", table=_answers(samples.loc[gain.index[::-1][:extreme]])),
        ]
    return sections


def _answers(samples: pd.DataFrame) -> Table:
    return ["prompt", "reference", "aligned", "judge", "reward"], [
        [
            *(_shown(text) for text in (_turns(row["prompt"]), row["reference"], row["policy"])),
            *(_change(row[f"{role}_reference"], row[f"{role}_policy"]) for role in ("judge", "reward")),
        ]
        for row in samples.to_dict("records")
    ]


def _lineage(evaluation: Evaluation, params: Params, workspace: Workspace) -> list[Section]:
    recorded = {"MLflow run": evaluation.metrics["mlflow_run_id"], "fingerprint": evaluation.ppo["fingerprint"]}
    return [
        Section("What it was made from", table=origin.sources(workspace)),
        Section("What made it", facts=recorded | origin.made_by(workspace)),
        Section("Parameters", facts=origin.parameters(params)),
    ]


def _html(section: Section, drawn: dict[str, Figure]) -> list[Markup]:
    blocks = [pages.heading(section.title)]
    if section.text:
        blocks.append(pages.paragraph(section.text))
    if section.table:
        blocks.append(pages.table(*section.table))
    if section.facts:
        blocks.append(pages.facts(section.facts))
    return [*blocks, *(pages.figure(drawn[name], PICTURES[name]) for name in section.pictures)]


def _markdown(section: Section) -> str:
    parts = [f"## {section.title}", section.text]
    if section.table:
        parts.append(pages.markdown_table(*section.table))
    if section.facts:
        parts.append(pages.markdown_table(["", ""], list(map(list, section.facts.items()))))
    return "\n\n".join(part for part in [*parts, *map(_picture, section.pictures)] if part)


def _picture(name: str) -> str:
    return f"![{PICTURES[name]}]({name}.svg)\n\n{PICTURES[name]}"


def _turns(prompt: str) -> str:
    """A conversation in the canonical form as one line a turn; any other prompt as it is."""
    try:
        turns = json.loads(prompt)
    except ValueError:
        return prompt
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _shown(text: str) -> str:
    # Every kind of line end becomes the one that the page and the Markdown know.
    text = "\n".join(text.strip().splitlines())
    return pages.excerpt(text, EXCERPT) or "(empty)"


def _difference(metrics: dict[str, Any], key: str) -> str:
    value, low, high = (metrics[f"{key}_difference{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _change(before: float, after: float) -> str:
    return f"{before:+.2f} → {after:+.2f}".replace(" ", "\N{NO-BREAK SPACE}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sd(gain: float) -> str:
    return f"{gain:+.2f} sd"
