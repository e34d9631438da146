"""Pictures of the axes: every figure's change on one scale, and the over-optimisation curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tasks import pages
from tasks.evaluation.comparisons import SIGNIFICANT, Result
from tasks.probes.base import CHAMPION, POLICY, REFERENCE
from tasks.probes.hacked import NEEDED, course
from tasks.reports import plots
from tasks.statistics import Z

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": pages.BLUE, "marker": "o", "linestyle": "none", "elinewidth": 1.6, "markersize": 6},
    CHAMPION: {"color": pages.VERMILION, "marker": "s", "linestyle": "none", "elinewidth": 1.6, "markersize": 6},
}
"""How the comparison with each subject is drawn: by colour and by shape."""


def axes_figure(results: Sequence[Result]) -> Figure:
    """The change of every figure against reference and champion on one scale, grouped by axis; right is better."""
    with pages.chart(width=9, height=1.2 + 0.32 * len(results)) as (fig, (axes,)):
        axes.set(
            title="Change of every figure", xlabel="← worse      standard deviations of single items      better →"
        )
        axes.axvline(0, color=plots.NEUTRAL, linewidth=1)
        for row, result in enumerate(results):
            for i, other in enumerate(result.against):
                _change(axes, -row + 0.17 * (len(result.against) - 1) * (1 - 2 * i), result, other)
            if row and _axis_of(result) != _axis_of(results[row - 1]):
                axes.axhline(0.5 - row, color="#D8DEE4", linewidth=1)
        axes.set_yticks([-row for row in range(len(results))], [f"{_axis_of(r)}: {r.figure.name}" for r in results])
        axes.set_ylim(0.4 - len(results), 0.6)
        axes.grid(visible=False, axis="y")
        for other in dict.fromkeys(other for result in results for other in result.against):
            axes.errorbar([], [], xerr=[], label=f"against the {other}", **MARKS[other])
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
    return fig


def _change(axes: Axes, height: float, result: Result, other: str) -> None:
    """One difference with its interval: filled where chance does not explain it."""
    figure, comparison = result.figure, result.against[other]
    spread = float(np.std(figure.values[REFERENCE])) or float(np.std(figure.values[POLICY])) or 1.0
    scale = (-1 if figure.better == "lower" else 1) / spread
    found = comparison.difference
    middle, low, high = (scale * x for x in (found.value, found.low, found.high))
    style = dict(MARKS[other])
    if figure.better == "same":
        style |= {"color": plots.NEUTRAL, "marker": "D"}
    if comparison.p >= SIGNIFICANT:
        style |= {"markerfacecolor": "white"}
    # The statistic of a skewed sample may lie on the edge of its interval, and rounding puts it beyond.
    reach = [[max(middle - min(low, high), 0.0)], [max(max(low, high) - middle, 0.0)]]
    axes.errorbar([middle], [height], xerr=reach, **style)


def _axis_of(result: Result) -> str:
    return result.figure.key.split(".")[0]


def overoptimisation_figure(cycles: pd.DataFrame, kl_budget: float) -> Figure:
    """What the reward model claims and what the judge confirms, against the KL that was spent on it."""
    table = plots.with_start(cycles).sort_values("kl") if "kl" in cycles else pd.DataFrame()
    with pages.chart(width=9, height=3.8) as (fig, (axes,)):
        axes.set(title="Gain by KL spent", xlabel="KL to the reference (nats a response)", ylabel=plots.SD)
        for role, name, colour, marker in plots.ROLES:
            plots.curve(axes, table, f"{role}_gain", x="kl", label=name, color=colour, marker=marker)
        if {"reward_gain", "judge_gain"} <= set(table):
            axes.fill_between(
                table["kl"], table["judge_gain"], table["reward_gain"],
                color=plots.NEUTRAL, alpha=0.13, linewidth=0, label="not confirmed by the judge",
            )  # fmt: skip
            for cycle, kl, gain in table[["cycle", "kl", "reward_gain"]].iloc[1:].itertuples(index=False):
                axes.annotate(f"{cycle:.0f}", (kl, gain), (0, 7), textcoords="offset points", ha="center", fontsize=8)
            _noise(axes, table)
        axes.axvline(kl_budget, color=plots.NEUTRAL, linewidth=1, linestyle=(0, (4, 3)), label="KL budget")
        axes.set_xlim(left=0)
        plots.legend(axes)
    return fig


def _noise(axes: Axes, table: pd.DataFrame) -> None:
    """The judge's 95 % interval, and where the two curves part."""
    if not set(NEEDED) <= set(table):
        return
    half = Z * table["judge_gain_se"].fillna(0.0)
    low, high = table["judge_gain"] - half, table["judge_gain"] + half
    axes.fill_between(table["kl"], low, high, color=plots.JUDGE, alpha=0.15, linewidth=0, label="the judge's interval")
    found = course(table.iloc[1:].sort_values("cycle"))
    for name, words in (("parted_kl", "they part"), ("turned_kl", "the judge's peak")):
        if name in found:
            axes.axvline(float(found[name]), color=pages.BLACK, linewidth=1, linestyle=":")
            axes.annotate(words, (float(found[name]), 0.02), (-3, 0), xycoords=("data", "axes fraction"),
                          textcoords="offset points", fontsize=8.5, rotation=90, ha="right")  # fmt: skip
