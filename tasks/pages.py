"""One look for every report: a self-contained HTML page that works offline and prints well.

A report is a list of blocks (`verdict`, `key_figures`, `heading`, `paragraph`, `table`, `figure`, `facts`) handed to
`page`. Text from data is escaped everywhere; only `Markup`, which the blocks return, passes as it is. Nothing is
loaded from anywhere, and a content security policy in the page holds the browser to that.

Light to import: matplotlib comes in with the first `chart`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common kind of colour vision; yellow left out, too pale for lines.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#1B1F24",
)  # fmt: skip
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)

_CHART_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#57606A",
    "axes.edgecolor": "#AFB8C1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EAEEF2",
    "xtick.color": "#57606A",
    "ytick.color": "#57606A",
    "text.color": BLACK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}

Tone = Literal["good", "bad", "warn", "plain"]


def page(title: str, lead: str, blocks: Sequence[str], style: str = "") -> str:
    """The whole HTML document. Put the `verdict` first: it is what a reader came for.

    `style` is CSS, beyond the house's, that blocks of another module need.
    """
    return str(_PAGE.format(title=title, lead=lead, style=Markup(_STYLE + style), body=Markup("\n").join(blocks)))


def verdict(ok: bool, text: str) -> Markup:
    """The banner that says how it ended."""
    tone, sign = ("good", "✓") if ok else ("bad", "✗")
    return Markup('<p class="verdict {}"><b aria-hidden="true">{}</b><span>{}</span></p>').format(tone, sign, text)


def badge(text: str, tone: Tone = "plain") -> Markup:
    """A small coloured label, for a table cell."""
    return Markup('<span class="badge {}">{}</span>').format(tone, text)


def heading(text: str) -> Markup:
    return Markup("<h2>{}</h2>").format(text)


def paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def key_figures(figures: Sequence[tuple[str, object, str]]) -> Markup:
    """A row of large numbers: (label, value, note below it)."""
    tile = Markup("<div><dt>{}</dt><dd>{}</dd><dd>{}</dd></div>")
    return Markup('<dl class="figures">{}</dl>').format(
        Markup("").join(tile.format(label, _cell(value), note) for label, value, note in figures)
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """A table that scrolls when it is wide; columns of numbers are aligned on the right."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    kinds = [Markup(' class="n"') if n else Markup("") for n in numeric]
    head = Markup("").join(Markup("<th{}>{}</th>").format(k, h) for k, h in zip(kinds, headers, strict=True))
    body = Markup("\n").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup("<td{}>{}</td>").format(k, _cell(c)) for k, c in zip(kinds, row, strict=True))
        )
        for row in rows
    )
    return Markup(
        '<div class="wide" tabindex="0"><table>{}<thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>'
    ).format(Markup("<caption>{}</caption>").format(caption) if caption else "", head, body)


def facts(items: Mapping[str, object]) -> Markup:
    """A definition list: where something came from, what it was made with."""
    return Markup('<dl class="facts">{}</dl>').format(
        Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(key, _cell(value)) for key, value in items.items())
    )


def figure(fig: Figure, alt: str) -> Markup:
    """The figure inside the page. `alt` says what it shows; it is the caption too."""
    return Markup('<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>').format(
        _data_uri(svg(fig)), alt, alt
    )


def svg(fig: Figure) -> bytes:
    """The figure as an SVG file, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "proximal"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


@contextmanager
def chart(columns: int = 1, width: float = 9.0, height: float = 3.2) -> Iterator[tuple[Figure, list[Axes]]]:
    """Empty axes side by side, to be drawn on inside the block, where the house style holds.

    Sizes are in inches: `with chart(columns=2) as (fig, (left, right)): ...`
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_CHART_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        fig = Figure(figsize=(width, height))
        yield fig, list(fig.subplots(1, columns, squeeze=False)[0])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table for Markdown: reports beside the page, Prefect artifacts, model cards."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [[markdown_text(h) for h in headers], ["--:" if n else "---" for n in numeric]]
    lines += [[markdown_text(show(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown_text(text: str) -> str:
    """Text of any origin, such that Markdown shows it as it is, on one line."""
    plain = text.striptags() if isinstance(text, Markup) else text
    # By number: before these MLflow's pages would show the backslash.
    numbered = re.sub(r"[&<>$]", lambda found: f"&#{ord(found[0])};", plain)
    escaped = re.sub(r"([\\`*{}\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", numbered)
    return re.sub(r"\s*\n\s*", " ⏎ ", escaped)


def embed_pictures(markdown: str, folder: Path) -> str:
    """Markdown with the pictures that lie in `folder` put inside it, for where files cannot follow."""

    def inside(match: re.Match[str]) -> str:
        picture = folder / match[1]
        return f"]({_data_uri(picture.read_bytes())})" if picture.is_file() else match[0]

    return re.sub(r"\]\(([\w-]+\.svg)\)", inside, markdown)


def excerpt(text: str, limit: int) -> str:
    """The text, or as much of its beginning as fits into `limit` characters with the sign that there was more."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show(value: object) -> str:
    """A value for a person: 12,345 and 0.123, about three digits, alike down a column; a missing one is a dash."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        return _decimal(float(value))
    return value if isinstance(value, str) else str(value)


def _decimal(number: float) -> str:
    size = abs(number)
    if 0 < size < 0.001:
        return f"{number:.2g}"
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{number:,.{places}f}"


def _data_uri(svg_file: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg_file).decode('ascii')}"


def _cell(value: object) -> Markup:
    return escape(show(value))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · Proximal</title>
<style>{style}</style>
</head>
<body>
<header><p>Proximal</p><h1>{title}</h1><p class="lead">{lead}</p></header>
<main>
{body}
</main>
</body>
</html>
""")

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa;
  --good: #00785a; --good-wash: #e6f5f0; --bad: #a84300; --bad-wash: #fdeee3; --warn: #8a5a00; --warn-wash: #fff4dc;
  --accent: #0072b2; --gap: 1.5rem; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; text-rendering: optimizeLegibility; -webkit-text-size-adjust: 100%; }
header > p:first-child { margin: 0; color: var(--accent); font-size: .8125rem; font-weight: 600; letter-spacing: .12em;
  text-transform: uppercase; }
h1 { margin: .25rem 0 .75rem; font-size: clamp(1.75rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; }
.lead { margin: 0 0 2rem; max-width: 44rem; color: var(--soft); font-size: 1.1875rem; line-height: 1.5; }
h2 { margin: 3.25rem 0 .75rem; font-size: 1.375rem; line-height: 1.3; letter-spacing: -.01em; }
main > p { max-width: 44rem; }
.verdict { display: flex; gap: .9rem; align-items: baseline; max-width: none; margin: 0 0 2rem; padding: 1.1rem 1.4rem;
  border-left: .375rem solid; border-radius: .375rem; font-size: 1.125rem; font-weight: 600; line-height: 1.45; }
.verdict b { font-size: 1.375rem; line-height: 1; }
.verdict span { color: var(--ink); white-space: pre-line; }
.verdict.good, .badge.good { color: var(--good); background: var(--good-wash); }
.verdict.bad, .badge.bad { color: var(--bad); background: var(--bad-wash); }
.badge { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; background: var(--wash); color: var(--soft);
  font-size: .8125rem; font-weight: 600; white-space: nowrap; }
.badge.warn { color: var(--warn); background: var(--warn-wash); }
dl, dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem;
  margin: var(--gap) 0; }
.figures div { padding: 1rem 1.15rem; border: 1px solid var(--line); border-radius: .5rem; }
.figures dt { color: var(--soft); font-size: .8125rem; font-weight: 600; line-height: 1.35; }
.figures dt + dd { margin: .3rem 0 .2rem; font-size: 1.75rem; font-weight: 650; line-height: 1.15;
  letter-spacing: -.02em; }
.figures dd + dd { color: var(--soft); font-size: .8125rem; line-height: 1.4; }
.facts { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: .4rem 2rem;
  margin: var(--gap) 0; font-size: .9375rem; }
.facts dt { color: var(--soft); }
.facts dd { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: var(--gap) 0; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; line-height: 1.45; }
caption { padding: 0 0 .6rem; color: var(--soft); font-size: .875rem; text-align: left; }
th { padding: .45rem .9rem; border-bottom: 2px solid var(--line); color: var(--soft); font-size: .8125rem;
  text-align: left; vertical-align: bottom; white-space: nowrap; }
td { padding: .5rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: pre-line;
  overflow-wrap: break-word; max-width: 34rem; }
th:first-child, td:first-child { padding-left: 0; }
th.n, td.n { text-align: right; white-space: nowrap; }
tbody tr:hover { background: var(--wash); }
figure { margin: var(--gap) 0 2.25rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .6rem; max-width: 44rem; color: var(--soft); font-size: .875rem; }
@page { margin: 18mm 16mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  .verdict, .badge, .figures div, figure, tr { break-inside: avoid;
    print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .wide { overflow: visible; }
  thead { display: table-header-group; }
}
"""
