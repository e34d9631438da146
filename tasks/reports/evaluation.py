"""The report of the evaluate stage: one page to decide from, and its Markdown twin.

Both are written from the same sections, so that neither says more than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ppo_core.seeds import derive
from tasks import origin, pages
from tasks.evaluation.axes import Axes
from tasks.evaluation.gate import Verdict
from tasks.inspector import drawing
from tasks.models.responses import Responses
from tasks.params import Params
from tasks.probes.base import CHAMPION, REFERENCE
from tasks.reports import answer_tables, axes_plots, axes_tables, plots
from tasks.reports.sections import Section, Table, html, markdown
from tasks.workspace import Workspace

TITLE = "Evaluation"
LEAD = (
    "The aligned model and the one it started from answer the same test prompts with the same seeds. The reward model, "
    "which training maximised, scores the answers, and so does the judge: another model, fitted to people's ratings of "
    "other texts, which training never asks."
)
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
    axes: Axes
    gate: Verdict
    inspections: Sequence[Markup] = ()
    """Blocks of the section *Token by token*, ready for the page; the Markdown points to them."""


def write_report(folder: Path, evaluation: Evaluation, params: Params, workspace: Workspace) -> None:
    """Write report.html, report.md and the pictures."""
    drawn = _pictures(evaluation, params)
    for name, picture in drawn.items():
        (folder / f"{name}.svg").write_bytes(pages.svg(picture))
    drawn["curves"].savefig(folder / "curves.png", dpi=160)
    figures = _key_figures(evaluation.metrics, params)
    opening = verdict(evaluation.metrics, evaluation.axes, evaluation.gate)
    sections = [
        *_results(evaluation),
        *_examples(evaluation, params),
        *_lineage(evaluation, params, workspace),
    ]
    blocks = [pages.verdict(*opening), pages.key_figures(figures)]
    blocks += [block for section in sections for block in html(section, drawn)]
    (folder / "report.html").write_text(pages.page(TITLE, LEAD, blocks, drawing.STYLE), encoding="utf-8")
    head = [f"**{'✓' if opening[0] else '✗'} {pages.markdown_text(opening[1])}**"]
    head += [pages.markdown_table(["", "", ""], [list(figure) for figure in figures])]
    whole = [f"# {TITLE}", LEAD, *head, *(markdown(section) for section in sections)]
    (folder / "report.md").write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def verdict(metrics: dict[str, Any], axes: Axes, gate: Verdict) -> tuple[bool, str]:
    """Whether the gate passed and the judge sees an improvement beyond chance, and the result in a few sentences.

    It is none where the model is more harmful or less honest than the reference, beyond chance.
    """
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
    worse = [r.figure for r in axes.results if r.against[REFERENCE].worse(r.figure.better)]
    if costs := [figure.name for figure in worse if not figure.key.startswith("hacked.")]:
        text += f" Beyond chance worse than the reference: {', '.join(costs)}."
    unsafe = any(figure.key.startswith(("harmless.", "honest.")) for figure in worse)
    better = low > 0.5 and metrics["judge_gain_low"] > 0 and not unsafe
    text += f"{_beside_the_champion(metrics)} The gate {gate.word}"
    return better and not gate.breaches, f"{text}: {', '.join(gate.breached)}." if gate.breaches else f"{text}."


def _gate(gate: Verdict) -> Section:
    rows: list[list[object]] = [["breached", breach.rule, breach.words] for breach in gate.breaches]
    rows += [["not checked", rule.rule, rule.words] for rule in gate.unchecked]
    text = "" if rows else "Every rule was checked and holds."
    return Section(f"The gate {gate.word}", text, (["outcome", "rule", "why"], rows) if rows else None)


def _beside_the_champion(metrics: dict[str, Any]) -> str:
    if (rate := metrics.get("helpful.judge_champion_wins")) is None:
        return ""
    low, high = (metrics[f"helpful.judge_champion_wins_{end}"] for end in ("low", "high"))
    return (
        f" Against the champion, version {metrics['champion_version']}, the judge prefers it in {_percent(rate)} "
        f"[{_percent(low)}, {_percent(high)}]."
    )


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
    return ({"axes": axes_plots.axes_figure(evaluation.axes.results)} if evaluation.axes.results else {}) | {
        "curves": plots.cycles_figure(cycles, budget, evaluation.ppo["result_cycle"]),
        "overoptimisation": axes_plots.overoptimisation_figure(cycles, budget),
        "language": plots.language_figure(cycles),
        "scores": plots.scores_figure(evaluation.policy, evaluation.reference),
    }


def _results(evaluation: Evaluation) -> list[Section]:
    metrics, ppo = evaluation.metrics, evaluation.ppo
    course = (
        f"Training maximised {ppo['maximised']}. It ended after cycle {ppo['cycles']}, with "
        f"{ENDINGS[ppo['stopped_by']]}. "
        f"Cycle {ppo['result_cycle']} is the result.{_parting(metrics)}"
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
    better: Table = (["figure", "value", "low", "high", "meaning"], preference)
    still: Table = (["figure", "reference", "aligned", "change (%)", "meaning"], language)
    return [
        _gate(evaluation.gate),
        *axes_tables.sections(evaluation.axes, _champion(evaluation.metrics)),
        Section("Is it better?", intervals, better, pictures=_named("scores")),
        Section("How it got there", course, pictures=_named("curves", "overoptimisation", "language")),
        Section("Is it still language?", repeated, still),
    ]


def _examples(evaluation: Evaluation, params: Params) -> list[Section]:
    draw = derive(params.seed, "evaluate", "samples")
    found = answer_tables.sections(evaluation.samples, evaluation.policy.kl, params.evaluate.samples, draw)
    if evaluation.inspections:
        found.append(Section("Token by token", blocks=evaluation.inspections))
    return found


def _lineage(evaluation: Evaluation, params: Params, workspace: Workspace) -> list[Section]:
    recorded = {"parent model": origin.parent(workspace), "champion": _champion(evaluation.metrics)}
    recorded |= {"MLflow run": evaluation.metrics["mlflow_run_id"], "fingerprint": evaluation.ppo["fingerprint"]}
    known = [axes_tables.meanings(evaluation.axes)] if evaluation.axes.results else []
    return [
        *known,
        Section("What it was made from", table=origin.sources(workspace)),
        Section("What made it", facts=recorded | origin.made_by(workspace) | origin.versions(workspace)),
        Section("Parameters", facts=origin.parameters(params)),
    ]


def _champion(metrics: dict[str, Any]) -> str:
    """Who the champion is, and whether it was compared with."""
    if (version := metrics.get("champion_version")) is None:
        return "there is none"
    name = f"version {version} of {metrics['champion_model']}"
    if CHAMPION in metrics.get("not_measured", {}):
        return f"{name}, not compared with: {metrics['not_measured'][CHAMPION]}"
    return f"{name}, which is this very policy" if metrics["champion_is_policy"] else f"{name}, asked the same here"


def _parting(metrics: dict[str, Any]) -> str:
    """What the curves by cycle say of over-optimisation, if the training recorded their noise."""
    words = metrics.get("hacked.unconfirmed.course")
    return f" On the dev prompts {words}." if words else ""


def _named(*pictures: str) -> dict[str, str]:
    return {name: PICTURES[name] for name in pictures}


def _difference(metrics: dict[str, Any], key: str) -> str:
    value, low, high = (metrics[f"{key}_difference{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sd(gain: float) -> str:
    return f"{gain:+.2f} sd"
