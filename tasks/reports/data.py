"""The report of the validate stage: a page for the person who decides whether the data is fit, and a Markdown twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from tasks import pages
from tasks.data.facts import PAIR_SPLITS, PROMPT_SPLITS, Tables
from tasks.expectations import Finding

TITLE = "Data validation"
LEAD = "What the preference data must satisfy before anything is trained on it, and whether it does."
PICTURES = {
    "pairs": "How clearly people preferred. Right: one half is chance, and a dot is as large as the pairs are many.",
    "lengths": "Lengths in tokens of the policy, by split: the middle half of the rows, and 5 to 95 % of them.",
}
EXCERPT = 160
"""Characters of a text that the report shows."""

Table = tuple[Sequence[str], list[list[object]]]


def write_report(folder: Path, findings: Sequence[Finding], tables: Tables, figures: dict[str, Any]) -> None:
    """Write report.html, report.md and the pictures.

    `tables` and `figures` are empty if the schema did not hold: the report then says only that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"pairs": _pairs_picture(tables["pairs"]), "lengths": _lengths_picture(tables)} if tables else {}
    for name, picture in pictures.items():
        (folder / f"{name}.svg").write_bytes(pages.svg(picture))
    page = pages.page(TITLE, LEAD, _html(findings, tables, figures, pictures))
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "report.md").write_text(_markdown(findings, tables, figures), encoding="utf-8")


def _html(
    findings: Sequence[Finding], tables: Tables, figures: dict[str, Any], pictures: dict[str, Figure]
) -> list[Markup]:
    blocks = [pages.verdict(*_verdict(findings))]
    if figures:
        blocks.append(pages.key_figures(_key_figures(figures)))
    if not all(finding.ok for finding in findings):
        blocks += [pages.heading("What breaks"), pages.table(*_breaches(findings))]
    if tables:
        blocks += [pages.heading("The data in pictures")]
        blocks += [pages.figure(picture, PICTURES[name]) for name, picture in pictures.items()]
        blocks += [pages.heading("Splits"), pages.table(*_splits(tables))]
        blocks += [pages.heading("Sources"), pages.table(*_sources(tables))]
        blocks += [pages.heading("A few pairs"), pages.table(*_examples(tables["pairs"]))]
    return [*blocks, pages.heading("Every expectation"), pages.table(*_all(findings))]


def _markdown(findings: Sequence[Finding], tables: Tables, figures: dict[str, Any]) -> str:
    ok, text = _verdict(findings)
    parts = [f"# {TITLE}", f"**{'✓' if ok else '✗'} {pages.markdown_text(text)}**"]
    if figures:
        parts.append(pages.markdown_table(["", "", ""], [list(figure) for figure in _key_figures(figures)]))
    if not all(finding.ok for finding in findings):
        parts += ["## What breaks", pages.markdown_table(*_breaches(findings))]
    if tables:
        parts += ["## The data in pictures", *(f"![{alt}]({name}.svg)\n\n{alt}" for name, alt in PICTURES.items())]
        parts += ["## Splits", pages.markdown_table(*_splits(tables))]
        parts += ["## Sources", pages.markdown_table(*_sources(tables))]
        parts += ["## A few pairs", pages.markdown_table(*_examples(tables["pairs"]))]
    return "\n\n".join([*parts, "## Every expectation", pages.markdown_table(*_all(findings))])


def _verdict(findings: Sequence[Finding]) -> tuple[bool, str]:
    critical, warnings = sum(f.critical for f in findings), sum(f.warning for f in findings)
    warned = f", with {_count(warnings, 'warning')}" if warnings else ""
    if critical:
        return False, f"The data is not fit for training: {_count(critical, 'critical expectation')} broken{warned}."
    return True, f"The data is fit for training: {_count(len(findings) - warnings, 'expectation')} hold{warned}."


def _key_figures(figures: dict[str, Any]) -> list[tuple[str, object, str]]:
    return [
        ("Preference pairs", figures["pairs"], "for the reward model and the judge"),
        ("Prompts", figures["prompts"], "for PPO, dev and test"),
        ("Raters who agree", figures["mean_target"], "mean share who prefer the chosen text"),
        ("Longer text wins", figures["longer_wins"], "one half would be no lesson in length"),
        ("Near ties", figures["near_ties"], "share of pairs on which raters are split"),
    ]


def _breaches(findings: Sequence[Finding]) -> Table:
    rows: list[list[object]] = [
        [_state(finding), f"{finding.name}: {finding.says}\n{finding.extent}", _places(finding), finding.mend]
        for finding in sorted(findings, key=lambda finding: finding.severity)
        if not finding.ok
    ]
    return ["", "what was expected and found", "first rows", "what to do"], rows


def _all(findings: Sequence[Finding]) -> Table:
    return ["", "expectation", "what it says", "severity", "rows", "broken"], [
        [_state(f), f.name, f.says, f.severity, f.checked, f.failed] for f in findings
    ]


def _splits(tables: Tables) -> Table:
    pairs = tables["pairs"]
    longest = pairs[["chosen_tokens", "rejected_tokens"]].max(axis=1)
    rows: list[list[object]] = []
    for split in PAIR_SPLITS:
        part = pairs[pairs["split"] == split]
        rows.append([split, len(part), *part[["margin", "target", "longer_wins"]].mean(), longest[part.index].max()])
    for split in PROMPT_SPLITS:
        prompts = tables["prompts"].query("split == @split")
        rows.append([split, len(prompts), None, None, None, prompts["tokens"].max()])
    return ["split", "rows", "mean margin", "mean target", "longer text wins", "longest (tokens)"], rows


def _sources(tables: Tables) -> Table:
    pairs, prompts = tables["pairs"], tables["prompts"]
    names = sorted({*pairs["source"].dropna(), *prompts["source"].dropna()})
    return ["source", "pairs", "prompts", "mean target"], [
        [name, int((pairs["source"] == name).sum()), int((prompts["source"] == name).sum()),
         pairs["target"][pairs["source"] == name].mean()]
        for name in names
    ]  # fmt: skip


def _examples(pairs: pd.DataFrame) -> Table:
    """The clearest, a middling and the closest pairs: by margin, ties by id, so always the same ones."""
    ordered = pairs.sort_values(["margin", "pair_id"], ascending=[False, True], ignore_index=True)
    picked = ordered.iloc[sorted({0, 1, len(ordered) // 2, len(ordered) - 2, len(ordered) - 1} & set(ordered.index))]
    return ["margin", "target", "prompt", "chosen", "rejected"], [
        [
            row["margin"],
            row["target"],
            *(pages.excerpt(str(row[text]), EXCERPT) for text in ("prompt", "chosen", "rejected")),
        ]
        for row in picked.to_dict("records")
    ]


def _pairs_picture(pairs: pd.DataFrame) -> Figure:
    gaps = pairs["margin"].replace([np.inf, -np.inf], np.nan).dropna()
    edges: list[float] = np.histogram_bin_edges(gaps, bins=20).tolist()
    with pages.chart(columns=2) as (fig, (left, right)):
        for kind, colour in (("reward", pages.BLUE), ("judge", pages.ORANGE)):
            chosen = gaps[pairs["split"].str.startswith(kind, na=False)[gaps.index]]
            left.hist(
                chosen,
                bins=edges,
                histtype="step",
                linewidth=2,
                color=colour,
                label=f"{kind} model" if kind == "reward" else kind,
            )
        left.set(title="Pairs by rating gap", xlabel="rating gap (margin)", ylabel="pairs")
        left.legend()
        bins = pairs["target"].groupby(pd.cut(gaps, edges[::2], include_lowest=True), observed=True)
        means, sizes = bins.mean(), bins.size()
        middles = [interval.mid for interval in means.index]
        right.plot(middles, means, color=pages.GREEN, linewidth=1.5)
        right.scatter(middles, means, s=12 + 160 * sizes / max(sizes.max(), 1), color=pages.GREEN)
        right.axhline(0.5, color=pages.BLACK, linewidth=1, linestyle=":")
        right.set(
            title="Raters who prefer the chosen text", xlabel="rating gap (margin)", ylabel="share", ylim=(0.4, 1.02)
        )
    return fig


def _lengths_picture(tables: Tables) -> Figure:
    pairs, prompts = tables["pairs"], tables["prompts"]
    lengths = {
        f"{s} · {kind}": pairs.loc[pairs["split"] == s, f"{kind}_tokens"]
        for s in PAIR_SPLITS
        for kind in ("chosen", "rejected")
    }
    lengths |= {f"{s} · prompt": prompts.loc[prompts["split"] == s, "tokens"] for s in PROMPT_SPLITS}
    with pages.chart(height=4.2) as (fig, (axes,)):
        axes.boxplot(
            [values.dropna() for values in lengths.values()], tick_labels=list(lengths), orientation="horizontal",
            whis=(5, 95), showfliers=False, patch_artist=True, widths=0.6,
            boxprops={"facecolor": pages.SKY, "edgecolor": pages.BLUE}, medianprops={"color": pages.BLACK},
        )  # fmt: skip
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(title="Lengths by split", xlabel="tokens")
    return fig


def _state(finding: Finding) -> Markup:
    if finding.ok:
        return pages.badge("holds", "good")
    return pages.badge("critical", "bad") if finding.critical else pages.badge("warning", "warn")


def _places(finding: Finding) -> str:
    return "\n".join(f"{example.place} — {pages.excerpt(example.value, EXCERPT)}" for example in finding.examples)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
