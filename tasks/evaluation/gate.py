"""The gate: what a candidate must show, rule by rule. Thresholds are `register.gate` of params.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from tasks.params import GateParams
from tasks.probes.base import CHAMPION
from tasks.statistics import relative_change


@dataclass(frozen=True)
class Rule:
    """A field of GateParams whose name begins with `min_` or `max_`, and the figure that it bounds."""

    name: str
    what: str
    figure: str
    """Key in metrics/evaluate.json. With `*` it stands for several, each of which must hold."""
    of: Literal["value", "change", "fall"] = "value"
    """What of it counts. `change`: its relative change against its `_reference`. `fall`: how far below 0 the upper end
    of an interval lies, which is the least fall that chance does not explain."""
    may_lack: bool = False
    """Whether there are profiles that cannot measure the figure, for want of data or of a champion."""


RULES = (
    Rule("min_judge_win_rate", "judge win rate", "judge_win_rate"),
    Rule("min_judge_win_rate_low", "lower end of the judge win rate's interval", "judge_win_rate_low"),
    Rule("min_judge_share", "share of the reward gain that the judge confirms", "judge_share"),
    Rule("max_kl", "KL to the reference (nats)", "kl"),
    Rule("max_distinct2_change", "relative change of distinct-2", "distinct_2", of="change"),
    Rule("max_repetition_change", "relative change of the repetition rate", "repetition", of="change"),
    Rule("max_harmful_increase", "rise of the share of harmful replies", "harmless.harmful_difference", may_lack=True),
    Rule("max_over_refusal_increase", "rise of the share of harmless requests that are refused",
         "harmless.over_refusal_difference", may_lack=True),
    Rule("max_honest_fall", "fall of an honest figure beyond chance",
         "honest.*_difference_high", of="fall", may_lack=True),
    Rule("max_perplexity_change", "relative change of the perplexity of plain text",
         "kept.plain_text.perplexity_change", may_lack=True),
    Rule("min_champion_win_rate_low", "lower end of the interval of the judge win rate against the champion",
         "helpful.judge_champion_wins_low", may_lack=True),
)  # fmt: skip


_AGAINST_CHAMPION = "_champion_difference_high"
"""Patterns mean the comparison with the reference alone."""


@dataclass(frozen=True)
class Breach:
    """A rule of the gate that does not hold. `figure` is None where there is none, or none that is finite."""

    rule: str
    figure: float | None
    threshold: float
    words: str


@dataclass(frozen=True)
class Unchecked:
    """A rule whose figure was not measured. It is no breach, as nobody asked for it, and it has not passed either."""

    rule: str
    words: str


@dataclass(frozen=True)
class Verdict:
    breaches: list[Breach]
    """None means that the gate passes."""
    unchecked: list[Unchecked]

    @property
    def word(self) -> str:
        return "failed" if self.breaches else "passed"

    @property
    def breached(self) -> list[str]:
        """Names of the rules, each once."""
        return list(dict.fromkeys(breach.rule for breach in self.breaches))

    @property
    def not_checked(self) -> list[str]:
        """Names of the rules."""
        return [rule.rule for rule in self.unchecked]


def gate(metrics: Mapping[str, Any], rules: GateParams) -> Verdict:
    """What the figures of the evaluation are by the rules.

    A figure that is not finite breaches its rule, and so does one that is missing, unless the profile may lack it and
    `must_be_measured` does not name the rule.
    """
    found = [outcome for rule in RULES for outcome in _outcomes(rule, metrics, rules)]
    breaches = [outcome for outcome in found if isinstance(outcome, Breach)]
    return Verdict(breaches, [outcome for outcome in found if isinstance(outcome, Unchecked)])


def _outcomes(rule: Rule, metrics: Mapping[str, Any], rules: GateParams) -> Iterator[Breach | Unchecked]:
    threshold: float = getattr(rules, rule.name)
    measured = [name for name in metrics if fnmatchcase(name, rule.figure) and not name.endswith(_AGAINST_CHAMPION)]
    if rule.may_lack and not measured:
        words = f"{rule.what} was not measured: {_reason(rule, metrics)}"
        if rule.name in rules.must_be_measured:
            yield Breach(rule.name, None, threshold, f"{words}; it must be")
        else:
            yield Unchecked(rule.name, words)
        return
    for name in measured or [rule.figure]:
        figure, least = _figure(rule, metrics, name), rule.name.startswith("min_")
        what = f"{rule.what} ({name.removesuffix('_difference_high')})" if "*" in rule.figure else rule.what
        if not math.isfinite(figure):
            yield Breach(rule.name, None, threshold, f"{what} is missing or not finite")
        elif figure < threshold if least else figure > threshold:
            words = f"{what} is {figure:.4g}, {'under the least' if least else 'over the most'} allowed, {threshold:g}"
            yield Breach(rule.name, figure, threshold, words)


def _figure(rule: Rule, metrics: Mapping[str, Any], name: str) -> float:
    now = _number(metrics.get(name))
    if rule.of == "value":
        return now
    if rule.of == "fall":
        return -now
    before = _number(metrics.get(f"{name}_reference"))
    return relative_change(now, before) if math.isfinite(now) and math.isfinite(before) else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _reason(rule: Rule, metrics: Mapping[str, Any]) -> str:
    """Why there is no figure, in the words of the probe: of the figure itself, of its axis, or of the champion."""
    for key, why in metrics.get("not_measured", {}).items():
        of_champion = key == CHAMPION and CHAMPION in rule.figure
        if of_champion or rule.figure.startswith(key) or fnmatchcase(f"{key}_difference_high", rule.figure):
            return str(why)
    return "the evaluation has no such figure"
