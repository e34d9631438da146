"""Pictures of training and of its result: curves by cycle, scores before and after, calibration.

Tables of cycles have the columns of plots/cycles.csv; a curve whose column is missing is left out. What the reward
model says is always blue, what the judge says always vermilion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tasks import pages
from tasks.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tasks.models.responses import Responses

REWARD, JUDGE, NEUTRAL = pages.BLUE, pages.VERMILION, "#8C959F"
ROLES = (("reward", "reward model", REWARD, "o"), ("judge", "judge", JUDGE, "s"))
"""Key, name, colour and marker of the two models of preference."""
LANGUAGE = (
    ("distinct_2", "distinct-2"),
    ("repetition", "repeated words"),
    ("entropy", "entropy"),
    ("length", "length"),
)
SD = "standard deviations of human text"
MARK: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}


def cycles_figure(cycles: pd.DataFrame, kl_budget: float, result_cycle: int | None = None) -> Figure:
    """Gains, judge win rate and KL by cycle on the dev prompts; `result_cycle` is the one that was kept."""
    table = with_start(cycles)
    with pages.chart(columns=3, width=11, height=3.3) as (fig, (gains, rates, divergence)):
        gains.set(title="Gain over the reference", ylabel=SD)
        for role, name, colour, marker in ROLES:
            curve(gains, table, f"{role}_gain", label=name, color=colour, marker=marker)
        rates.set(title="Judge prefers the aligned model", ylabel="share of prompts")
        curve(rates, table, "judge_win_rate", color=JUDGE, marker="s")
        _level(rates, 0.5, "no better than chance")
        _shares(rates)
        divergence.set(title="KL to the reference", ylabel="nats a response")
        curve(divergence, table, "kl", color=pages.BLACK, marker="o")
        _level(divergence, kl_budget, "budget")
        divergence.set_ylim(0, 1.12 * divergence.get_ylim()[1])
        for axes in (gains, rates, divergence):
            _cycles_axis(axes, table, result_cycle)
        legend(gains)
    return fig


def language_figure(cycles: pd.DataFrame) -> Figure:
    """Diversity, repetition, entropy and length by cycle, relative to the reference."""
    table = with_start(cycles)
    with pages.chart(width=9, height=3.4) as (fig, (axes,)):
        axes.set(title="Language against the reference", ylabel="relative to the reference")
        axes.axhline(1, color=NEUTRAL, linewidth=1)
        for (column, name), colour in zip(LANGUAGE, (pages.BLUE, pages.ORANGE, pages.GREEN, pages.PURPLE), strict=True):
            if {column, f"{column}_reference"} <= set(cycles):
                reference = table[f"{column}_reference"].bfill().replace(0, np.nan)
                ratio = (table[column] / reference).where(table["cycle"] > 0, 1.0)
                axes.plot(table["cycle"], ratio, label=name, color=colour, marker="o", **MARK)
        _cycles_axis(axes, table, None)
        legend(axes, outside=True)
    return fig


def scores_figure(policy: Responses, reference: Responses) -> Figure:
    """Scores of the answers before and after, by the reward model and by the judge."""
    with pages.chart(columns=2, width=9, height=3.2) as (fig, panels):
        for axes, (role, name, colour, _) in zip(panels, ROLES, strict=True):
            before, after = getattr(reference, role), getattr(policy, role)
            edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=30).tolist()
            axes.set(title=f"Scores by the {name}", xlabel=SD, ylabel="answers")
            axes.hist(before, edges, color=NEUTRAL, alpha=0.45, label="reference")
            axes.hist(after, edges, color=colour, alpha=0.45, label="aligned")
            axes.axvline(float(before.mean()), color="#57606A", linewidth=1.6, linestyle=(0, (4, 3)))
            axes.axvline(float(after.mean()), color=colour, linewidth=1.6, linestyle=(0, (4, 3)))
            legend(axes)
    return fig


def reward_model_figure(metrics: dict[str, Any]) -> Figure:
    """Held-out accuracy by rating gap, and calibration, of the reward model and the judge.

    `metrics` are those of the reward_model stage: {"reward": {"by_margin", "calibration", ...}, "judge": ...}. Several
    reward models are `reward_NAME` each, and differ in their markers.
    """
    names = [role.removeprefix("reward_") for role in metrics if role.startswith("reward_")]
    named = [(f"reward_{name}", f"reward model {name}", REWARD, "o^Dv<>"[i % 6]) for i, name in enumerate(names)]
    roles = (*named, ROLES[1]) if named else ROLES
    with pages.chart(columns=2, width=9, height=3.8) as (fig, (left, right)):
        left.set(title="Accuracy by rating gap", xlabel="rating gap of the pair", ylabel="held-out accuracy")
        right.set(title="Calibration", xlabel="confidence of the model", ylabel="raters who agree")
        _level(left, 0.5, "chance")
        right.plot([0.5, 1], [0.5, 1], color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
        gaps = sorted({(b["low"], b["high"]) for role, *_ in roles for b in metrics[role]["by_margin"]})
        left.set_xticks(range(len(gaps)), [f"{low:g}–{high:g}" for low, high in gaps])
        for shift, (role, name, colour, marker) in zip(np.linspace(-0.08, 0.08, len(roles)), roles, strict=True):
            style = {"color": colour, "marker": marker}
            places = [gaps.index((b["low"], b["high"])) + shift for b in metrics[role]["by_margin"]]
            _accuracies(left, places, metrics[role]["by_margin"], label=name, **style)
            _calibration(right, metrics[role]["calibration"], label=f"{name} (ECE {metrics[role]['ece']:.3f})", **style)
        right.set_xlim(0.49, 1.01)
        for axes in (left, right):
            _shares(axes)
        legend(left, "lower right")
        legend(right, "lower right")
    return fig


def _accuracies(axes: Axes, places: list[float], bins: list[dict[str, Any]], **style: Any) -> None:
    accuracy = np.array([b["accuracy"] for b in bins])
    intervals = np.array([wilson(b["accuracy"], b["n"]) for b in bins]).T
    axes.errorbar(places, accuracy, np.abs(intervals - accuracy), linewidth=0, elinewidth=1.4, **MARK, **style)


def _calibration(axes: Axes, bins: list[dict[str, Any]], color: str, **style: Any) -> None:
    x, y = ([b[key] for b in bins] for key in ("confidence", "agreement"))
    axes.plot(x, y, color=color, linewidth=1.2, alpha=0.7)
    # A dot is as large as its pairs are many: one alone in its bin says little.
    most = max(b["n"] for b in bins)
    sizes = [12 + 80 * b["n"] / most for b in bins]
    axes.scatter(x, y, sizes, color=color, edgecolor="white", linewidth=0.6, zorder=3, **style)


def with_start(cycles: pd.DataFrame) -> pd.DataFrame:
    """With the reference as cycle 0: no gain, no KL, and half of the wins, by definition."""
    start = {"cycle": 0, "reward_gain": 0.0, "judge_gain": 0.0, "kl": 0.0, "judge_win_rate": 0.5}
    return pd.DataFrame([{k: v for k, v in start.items() if k in cycles}, *cycles.to_dict("records")])


def curve(axes: Axes, table: pd.DataFrame, column: str, x: str = "cycle", **style: Any) -> None:
    if column in table:
        axes.plot(table[x], table[column], **MARK, **style)


def _level(axes: Axes, height: float, name: str) -> None:
    """A dashed line across, with its name on it."""
    axes.axhline(height, color=NEUTRAL, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        name, (1, height), (-2, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", fontsize=8.5, color="#57606A",
    )  # fmt: skip


def _shares(axes: Axes) -> None:
    """The upper half of the shares, and what lies lower only if something does."""
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)


def _cycles_axis(axes: Axes, table: pd.DataFrame, result_cycle: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("cycle")
    axes.set_xlim(-0.2, table["cycle"].max() + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if result_cycle is not None:
        axes.axvspan(result_cycle - 0.18, result_cycle + 0.18, color=NEUTRAL, alpha=0.16, linewidth=0)


def legend(axes: Axes, place: str = "best", outside: bool = False) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    if outside:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    else:
        axes.legend(loc=place, fontsize=9)
