"""The page of a registered version: what a person needs to decide whether it replaces the champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tasks.models.preference_models import label
from tasks.pages import excerpt, markdown_table, markdown_text, show
from tasks.params import GateParams
from tasks.registration.champion_tags import EVALUATE_AGAIN, FIGURES, ChampionFigures, difference

LIMIT = 5000
"""Characters that MLflow's databases hold of a description; samples are shown as far as they fit."""
TEXT, FIELD = 160, 60
"""Characters shown of a sample, and of what is said about a source."""
SOURCES = 8
DECISIONS, WORDS = 3, 200
"""Decisions shown, the newest, and characters of each; the audit trail has them whole."""
ROOM = DECISIONS * (WORDS + 20)
"""Characters that are kept free for them."""
AXES = ("harmless.", "honest.", "kept.")
"""Of helpful and hacked the results tell."""
_REVIEW = "### Review\n\n"


@dataclass(frozen=True)
class Evidence:
    """Everything that the card says."""

    uri: str
    """Of the registered version, as MLflow loads it."""
    metrics: Mapping[str, Mapping[str, Any]]
    """Of the stages validate, reward_model, ppo and evaluate."""
    rules: GateParams
    breaches: Sequence[str]
    """In words; none if the gate passed."""
    unchecked: Sequence[str]
    """Rules of the gate whose figures were not measured, in words."""
    provenance: Sequence[Mapping[str, Any]]
    samples: pd.DataFrame
    """prompt, reference, policy and the judge's scores, in the order of the test prompts."""
    champion: ChampionFigures | None
    other_champion: bool
    """Whether the evaluation compared with another champion than there is now."""
    lineage: Mapping[str, str]
    decisions: Sequence[str]
    """On this version, the oldest first, where it is registered again."""


def write(evidence: Evidence) -> str:
    """The card in Markdown, at most LIMIT characters."""
    results = [_results(evidence), _axes(evidence), _preferences(evidence), _data(evidence)]
    before = [_verdict(evidence), _review(evidence), *results]
    after = [_origin(evidence), _use(evidence)]
    room = LIMIT - ROOM - sum(len(part) + 1 for part in (*before, *after))
    card = "\n".join([*before, _samples(evidence, room), *after])[:LIMIT]
    return reviewed(card, evidence.decisions) if evidence.decisions else card


def reviewed(card: str, decisions: Sequence[str]) -> str:
    """The card with the newest of these decisions in place of what it says on its review, or on top of it."""
    lines = "\n".join(f"- {markdown_text(excerpt(words, WORDS))}" for words in reversed(decisions[-DECISIONS:]))
    before, review, after = card.partition(_REVIEW)
    rest = after[after.find("\n### ") :] if "\n### " in after else ""
    parts = (before, f"{_REVIEW}{lines}\n", rest) if review else (f"{_REVIEW}{lines}\n\n", before)
    return "".join(parts)[:LIMIT]


def _verdict(evidence: Evidence) -> str:
    unchecked = "".join(f"\n- not checked: {markdown_text(_short(words, TEXT))}" for words in evidence.unchecked)
    if not evidence.breaches:
        return f"**Gate passed.** {_what(evidence)}\n{unchecked}\n"
    reasons = "".join(f"\n- {markdown_text(words)}" for words in evidence.breaches)
    return f"**Gate failed**, so this version has no alias:\n{reasons}{unchecked}\n\n{_what(evidence)}\n"


def _review(evidence: Evidence) -> str:
    _, name, number = evidence.uri.split("/")
    command = f'python -m tasks promote {number} --model {name} --reason "..."'
    if evidence.breaches:
        return f"{_REVIEW}Wanted all the same: `{command} --despite-gate`.\n"
    if evidence.other_champion:
        return f"{_REVIEW}No alias: {EVALUATE_AGAIN}.\n"
    return f"{_REVIEW}Waits for a person: `{command}`, or `reject`; or give it the alias `champion` here.\n"


def _what(evidence: Evidence) -> str:
    ppo = evidence.metrics["ppo"]
    return (
        f"A language model aligned to human preferences with PPO: cycle {show(ppo.get('result_cycle'))} of "
        f"{show(ppo.get('cycles'))}, training ended by {show(ppo.get('stopped_by'))}. It maximised "
        f"{markdown_text(str(ppo.get('maximised')))}."
    )


def _results(evidence: Evidence) -> str:
    """On the test prompts, against the model before alignment."""
    found, rules = evidence.metrics["evaluate"], evidence.rules
    champion = evidence.champion
    gates = {
        "judge_win_rate": f"≥ {rules.min_judge_win_rate:g}, interval ≥ {rules.min_judge_win_rate_low:g}",
        "judge_share": f"≥ {rules.min_judge_share:g}",
        "kl": f"≤ {rules.max_kl:g}",
        "distinct_2": f"within {rules.max_distinct2_change:.0%} of before",
        "repetition": f"within {rules.max_repetition_change:.0%} of before",
    }
    labels = FIGURES | {
        "distinct_2": "Distinct-2",
        "repetition": "Repeated words",
        "length": "Length, tokens",
        "perplexity": "Perplexity under the model before",
    }
    headers = ["Figure", "After", "Before", "Gate"]
    headers += [f"Champion (version {champion.version})", "Difference to it"] if champion else []
    rows = [
        [label, _interval(found, key), found.get(f"{key}_reference"), gates.get(key, "")]
        + ([champion.figures.get(key), _signed(difference(found, champion, key))] if champion else [])
        for key, label in labels.items()
    ]
    own = "\nWhat was not measured of the champion on these prompts is from its own evaluation.\n"
    note = own if champion and not champion.measured else ""
    prompts = show(found.get("n"))
    return f"### Results on {prompts} test prompts, with 95 % intervals\n\n{markdown_table(headers, rows)}{note}"


def _axes(evidence: Evidence) -> str:
    """What it says and does otherwise than the model before and the champion; and what nobody measured."""
    found = evidence.metrics["evaluate"]
    keys = [key for key in found if key.startswith(AXES) and f"{key}_difference" in found]
    compared = any(f"{key}_champion_difference" in found for key in keys)
    headers = ["Axis", "After", "Before", "Change", *(["To champion"] if compared else [])]
    rows = [
        [key, found[key], found.get(f"{key}_reference"), _interval(found, f"{key}_difference")]
        + ([_interval(found, f"{key}_champion_difference")] if compared else [])
        for key in keys
    ]
    gaps = found.get("not_measured", {})
    told = "".join(f"\n- not measured: {markdown_text(_short(f'{key}: {why}', TEXT))}" for key, why in gaps.items())
    return f"### Harmless, honest, kept\n\n{markdown_table(headers, rows) if rows else ''}{told}\n"


def _preferences(evidence: Evidence) -> str:
    found = evidence.metrics["reward_model"]
    names = {role: label(role).capitalize() for role in found} | {"judge": "Judge, which trained nothing"}
    rows = [
        [
            label,
            _interval(found.get(role, {}), "accuracy"),
            found.get(role, {}).get("n"),
            found.get(role, {}).get("ece"),
        ]
        for role, label in names.items()
    ]
    return (
        "### Models of preference, on held-out pairs\n\n"
        f"{markdown_table(['Model', 'Pair accuracy', 'Pairs', 'Calibration error'], rows)}"
    )


def _data(evidence: Evidence) -> str:
    fields = ("name", "source", "version", "licence", "rows")
    rows = [[_short(entry.get(field), FIELD) for field in fields] for entry in evidence.provenance[:SOURCES]]
    hidden = len(evidence.provenance) - len(rows)
    more = f"and {hidden} more in the run's data sets. " if hidden else ""
    checks = evidence.metrics["validate"].get("expectations", {})
    verdict = f"{show(checks.get('passed'))} of {show(checks.get('checked'))} expectations on the data held.\n"
    return f"### Made from\n\n{markdown_table(['What', 'Source', 'Version', 'Licence', 'Rows'], rows)}\n{more}{verdict}"


def _samples(evidence: Evidence, room: int) -> str:
    """The first test prompts, not chosen, as many as fit into `room` characters."""
    headers = ["Prompt", "Before", "Judge", "After", "Judge"]
    columns = ["prompt", "reference", "judge_reference", "policy", "judge_policy"]
    rows = [[_short(cell, TEXT) for cell in row] for row in evidence.samples[columns].head(8).itertuples(index=False)]
    title = "### The first test prompts, before and after (judge's score in sd)\n\n"
    while rows and len(title) + len(markdown_table(headers, rows)) + 1 > room:
        rows.pop()
    return title + markdown_table(headers, rows) if rows else ""


def _origin(evidence: Evidence) -> str:
    return "### Origin\n\n" + "\n".join(f"- {key}: `{value}`" for key, value in evidence.lineage.items()) + "\n"


def _use(evidence: Evidence) -> str:
    return (
        "### Use\n\n```python\nimport mlflow\n"
        f'mlflow.pyfunc.load_model("{evidence.uri}").predict(["The film"], params={{"max_new_tokens": 24}})\n```\n\n'
        "Self-contained and offline. The run's artifacts hold the whole report (`reports/evaluate`).\n"
    )


def _interval(found: Mapping[str, Any], key: str) -> str:
    value, low, high = (found.get(key + end) for end in ("", "_low", "_high"))
    return show(value) if low is None or high is None else f"{show(value)} ({show(low)} to {show(high)})"


def _signed(value: float | None) -> str:
    return show(None) if value is None else f"{'+' if value >= 0 else ''}{show(value)}"


def _short(value: Any, limit: int) -> Any:
    return excerpt(value, limit) if isinstance(value, str) else value
