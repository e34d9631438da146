"""The axes in the evaluation report: every figure with its interval, against the reference and against the champion."""

from __future__ import annotations

from collections.abc import Sequence

from tasks import pages
from tasks.evaluation.axes import Axes
from tasks.evaluation.comparisons import SIGNIFICANT, Comparison, Result
from tasks.probes.base import CHAMPION, POLICY, REFERENCE
from tasks.reports.sections import Section, Table
from tasks.statistics import Interval

FOREST = (
    "The change of each figure, in standard deviations of the reference's single items so that all fit one scale, with "
    "its 95 % interval. A filled mark is a change that chance does not explain (p < 0.05). Diamonds: "
    "any change is a cost, whichever side it is on."
)
_NOTE = (
    "Change is aligned less reference, item by item, with its 95 % interval (bootstrap over prompts or texts). p: how "
    "often chance alone would part two equal models as far (sign-flip test, two-sided). The p values stand each for "
    "itself: of twenty figures of equal models, one lies below 0.05."
)


def sections(axes: Axes, champion: str) -> list[Section]:
    """Picture and tables; `champion` says in words whom the aligned model is compared with beside the reference."""
    gaps = {gap.name: f"not measured: {gap.reason}" for gap in axes.not_measured}
    found = [Section("Every axis", facts=gaps, pictures={"axes": FOREST} if axes.results else {})]
    if axes.results:
        found.append(Section("Against the reference", _NOTE, _table(axes.results, REFERENCE)))
    if compared := [result for result in axes.results if CHAMPION in result.against]:
        found.append(Section("Against the champion", f"The champion is {champion}.", _table(compared, CHAMPION)))
    return found


def meanings(axes: Axes) -> Section:
    """What each figure says, and what else is known of it."""
    return Section("What the figures mean", facts={result.figure.name: _meaning(result) for result in axes.results})


def reading(comparison: Comparison, better: str) -> str:
    """What a comparison comes to, in a word or two."""
    if comparison.p >= SIGNIFICANT:
        return "no clear change"
    if better == "same":
        return "changed"
    return "worse" if comparison.worse(better) else "better"


def value(x: float, unit: str) -> str:
    """A figure with its unit."""
    return f"{100 * x:.1f} %" if unit == "share" else f"{x:.3g} {unit}" if abs(x) < 100 else f"{x:.0f} {unit}"


def between(interval: Interval, unit: str) -> str:
    """A difference and its interval; of shares, in percentage points."""
    scale, places = (100, 1) if unit == "share" else (1, 2 if unit != "tokens" else 1)
    low, high = (f"{scale * end:+.{places}f}" for end in (interval.low, interval.high))
    return f"{scale * interval.value:+.{places}f} {'pp' if unit == 'share' else unit} [{low}, {high}]"


def _table(results: Sequence[Result], other: str) -> Table:
    headers = ["axis", "figure", "aligned", other, "change [95 %]", "p", "reading", "win rate [95 %]", "items"]
    return headers, [_row(result, other) for result in results]


def _row(result: Result, other: str) -> list[object]:
    figure, against = result.figure, result.against[other]
    word = reading(against, figure.better)
    tones: dict[str, pages.Tone] = {"worse": "bad", "better": "good", "changed": "warn"}
    wins = against.wins
    return [
        figure.key.split(".")[0],
        figure.name,
        value(result.means[POLICY].value, figure.unit),
        value(result.means[other].value, figure.unit),
        between(against.difference, figure.unit),
        "< 0.001" if against.p < 0.001 else f"{against.p:.3f}",
        pages.badge(word, tones.get(word, "plain")),
        f"{100 * wins.value:.1f} % [{100 * wins.low:.1f}, {100 * wins.high:.1f}]" if wins else "",
        result.means[POLICY].n,
    ]


def _meaning(result: Result) -> str:
    figure = result.figure
    beside = [f"{name} reaches {value(x, figure.unit)}" for name, x in figure.baselines.items()]
    known = [f"{name.replace('_', ' ')}: {pages.show(x)}" for name, x in figure.facts.items()]
    return " ".join([figure.meaning, *(f"{words[0].upper()}{words[1:]}." for words in (*beside, *known))])
