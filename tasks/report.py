"""The report of the evaluate stage: one page to decide from, and its Markdown twin.

Both are written from the same sections, so that neither says more than the other.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ppo_core.seeds import derive
from tasks import pages, plots
from tasks.fingerprint import environment
from tasks.params import Params, dump_params
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
    ("repetition", "repetition", "Share of an answer's word triples that occurred in it before; mean over answers."),
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


@dataclass(frozen=True)
class Section:
    """A part of the report, in the order text, pictures, table."""

    title: str
    text: str = ""
    pictures: tuple[str, ...] = ()
    table: Table | None = None


def write(folder: Path, evaluation: Evaluation, params: Params, workspace: Workspace) -> str:
    """Write report.html, report.md and the pictures; give a short Markdown for where a reader decides."""
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
    return pages.embed_pictures("\n\n".join([*head, _picture("curves"), _picture("overoptimisation")]), folder)


def verdict(metrics: dict[str, Any]) -> tuple[bool, str]:
    """Whether the judge sees an improvement that chance does not explain, and the result in a few sentences."""
    rate, low, high = (metrics[f"judge_win_rate{end}"] for end in ("", "_low", "_high"))
    text = (
        f"Of {metrics['n']:,} test prompts the judge prefers the aligned model in {_percent(rate)} "
        f"[{_percent(low)}, {_percent(high)}]. The reward model sees {_sd(metrics['reward_gain'])}, the judge "
        f"{_sd(metrics['judge_gain'])}: it confirms {metrics['judge_share']:.0%} of the gain, "
        f"at a KL of {metrics['kl']:.1f} nats."
    )
    if low <= 0.5:
        text += " The judge prefers the reference." if high < 0.5 else " That may be chance."
    if metrics["reward_gain_low"] > 0 and metrics["judge_gain_low"] <= 0:
        text += " The judge does not confirm what the reward model sees: the reward is being gamed."
    return low > 0.5 and metrics["judge_gain_low"] > 0, text


def _key_figures(metrics: dict[str, Any], params: Params) -> list[tuple[str, object, str]]:
    def between(key: str, show: Any) -> str:
        return f"95 %: {show(metrics[f'{key}_low'])} to {show(metrics[f'{key}_high'])}"

    return [
        ("Judge win rate", _percent(metrics["judge_win_rate"]), between("judge_win_rate", _percent)),
        ("Judge gain", _sd(metrics["judge_gain"]), between("judge_gain", _sd)),
        ("Reward gain", _sd(metrics["reward_gain"]), between("reward_gain", _sd)),
        ("Confirmed by the judge", f"{metrics['judge_share']:.0%}", between("judge_share", "{:.0%}".format)),
        ("KL to the reference", f"{metrics['kl']:.1f} nats", f"budget {params.ppo.kl_budget:g}"),
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
    course = f"{ppo['cycles']} cycles, ended by {ppo['stopped_by']}; cycle {ppo['result_cycle']} is the result."
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
        Section("Is it better?", intervals, ("scores",), (["figure", "value", "low", "high", "meaning"], preference)),
        Section("How it got there", course, ("curves", "overoptimisation", "language")),
        Section(
            "Is it still language?",
            "The same answers, whatever anyone thinks of them.",
            table=(["figure", "reference", "aligned", "change (%)", "meaning"], language),
        ),
    ]


def _examples(samples: pd.DataFrame, params: Params) -> list[Section]:
    """Answers side by side: where the judge sees most gained, most lost, and drawn blindly."""
    count = min(params.evaluate.samples, len(samples))
    extreme = count // 3
    gain = (samples["judge_policy"] - samples["judge_reference"]).sort_values(ascending=False, kind="stable")
    draw = np.random.default_rng(derive(params.seed, "evaluate", "samples"))
    blind = draw.choice(len(samples), count - 2 * extreme, replace=False)
    return [
        Section(
            "Answers drawn at random",
            "All of them are in reports/samples.parquet.",
            table=_answers(samples.iloc[blind]),
        ),
        Section("Largest gains by the judge", table=_answers(samples.loc[gain.index[:extreme]])),
        Section("Largest losses by the judge", table=_answers(samples.loc[gain.index[::-1][:extreme]])),
    ]


def _answers(samples: pd.DataFrame) -> Table:
    scores = ["judge_reference", "judge_policy", "reward_reference", "reward_policy"]
    return ["prompt", "reference", "aligned", "judge before", "after", "reward before", "after"], [
        [
            _shown(_turns(row["prompt"])),
            _shown(row["reference"]),
            _shown(row["policy"]),
            *(round(row[s], 2) for s in scores),
        ]
        for row in samples.to_dict("records")
    ]


def _lineage(evaluation: Evaluation, params: Params, workspace: Workspace) -> list[Section]:
    provenance = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    columns = ["name", "source", "version", "licence", "rows", "sha256"]
    sources: list[list[object]] = [[entry.get(column) for column in columns] for entry in provenance]
    made: dict[str, object] = {
        "git commit": _commit(workspace.root),
        "MLflow run": evaluation.metrics["mlflow_run_id"],
        "fingerprint of the training": evaluation.ppo["fingerprint"],
        "python": platform.python_version(),
        **environment(),
    }
    flat = pd.json_normalize(dump_params(params), sep=".").iloc[0].to_dict()
    return [
        Section("What it was made from", table=(columns, sources)),
        Section("What made it", table=(["", ""], [[key, str(value)] for key, value in made.items()])),
        Section("Parameters", table=(["parameter", "value"], [[key, str(value)] for key, value in flat.items()])),
    ]


def _html(section: Section, drawn: dict[str, Figure]) -> list[Markup]:
    blocks = [pages.heading(section.title)]
    if section.text:
        blocks.append(pages.paragraph(section.text))
    blocks += [pages.figure(drawn[name], PICTURES[name]) for name in section.pictures]
    return [*blocks, pages.table(*section.table)] if section.table else blocks


def _markdown(section: Section) -> str:
    parts = [f"## {section.title}", section.text, *map(_picture, section.pictures)]
    parts += [pages.markdown_table(*section.table)] if section.table else []
    return "\n\n".join(part for part in parts if part)


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
    return (text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…") or "(empty)"


def _commit(root: Path) -> str:
    """The commit, marked where tracked files differ from it; "none" outside a repository (a container image, say)."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    described = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "none"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sd(gain: float) -> str:
    return f"{gain:+.2f} sd"
