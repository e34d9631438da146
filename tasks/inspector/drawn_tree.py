"""The tree of completions as a drawing: branches as wide as many take them, forks and ends in their colours."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tasks.inspector.diverging import Diverging, signed
from tasks.inspector.inspection import Completion, Token
from tasks.inspector.token_texts import cells, elide, visible
from tasks.inspector.tree import Branch, Placed, grow, leaves, place

WIDTH, ROW, GAP, LEFT = 1040, 46, 34, 14
"""Pixels: the whole drawing, a leaf, a fork, the margin before the root."""
CELL = 7.53
"""Pixels that a character of the labels takes: .602 em of 12.5 in the fonts that are monospaced."""
SCORES = 92
"""Pixels at the right end, for the ends of the paths."""
SHARED, LEAST = 26, 12
"""Cells of the label of a branch that forks, and of a leaf that finds no room."""


def from_the_best(completions: Sequence[Completion]) -> list[tuple[Completion, int]]:
    """What was said and how often, from top to bottom of the tree: the best first, those that go with it next."""
    ranked = _ranked(completions)
    return [(ranked[leaf.completions[0]], len(leaf.completions)) for leaf in leaves(_tree(ranked))]


def drawn(completions: Sequence[Completion], values: Diverging, scores: Diverging) -> Markup:
    """The tree as SVG. Forks have the colour of the critic's value there, ends that of their score."""
    completions = _ranked(completions)
    root = _tree(completions)
    placed = place(root, lambda branch: _width(branch, completions), ROW, GAP)
    width = max([WIDTH, *(LEFT + p.left + LEAST * CELL + SCORES for p in placed if not p.branch.children)])
    ends = width - SCORES
    parts = [_line(p, ends, len(completions)) for p in placed]
    for p in placed:
        parts.append(_label(p, ends, completions))
        parts.append(_fork(p, completions, values) if p.branch.children else _end(p, ends, completions, scores))
    return Markup('<svg class="tree" viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">{}</svg>').format(
        f"{width:.0f}",
        sum(ROW for _ in leaves(root)),
        f"{width:.0f}",
        f"{len(completions)} completions, parting where their tokens differ",
        Markup("\n").join(parts),
    )


def _ranked(completions: Sequence[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: -completion.score)


def _tree(completions: Sequence[Completion]) -> Branch:
    return grow([[token.id for token in completion.tokens] for completion in completions])


def _text(branch: Branch, completions: Sequence[Completion]) -> str:
    """What the tokens of a branch say, on one line."""
    return "".join(map(token_label, completions[branch.completions[0]].tokens[branch.start : branch.end]))


def token_label(token: Token) -> str:
    """What stands for a token: its text, its name, or a sign for a part of a character."""
    return token.control or visible(token.text) or "◌"


def _width(branch: Branch, completions: Sequence[Completion]) -> float:
    """Of a branch's own line, in pixels; a leaf's goes on to the right end anyway."""
    return min(cells(_text(branch, completions)), SHARED) * CELL + 14 if branch.children else 0.0


def _stroke(branch: Branch, of: int) -> float:
    return 2 + 10 * (len(branch.completions) - 1) / max(of - 1, 1)


def _line(p: Placed, ends: float, of: int) -> Markup:
    left, right = LEFT + p.left, LEFT + p.right if p.branch.children else ends
    start = f"M{left:.1f} {p.y:.1f}"
    if p.parent is not None:
        x, y = LEFT + p.parent[0], p.parent[1]
        bend = (x + left) / 2
        start = f"M{x:.1f} {y:.1f}C{bend:.1f} {y:.1f} {bend:.1f} {p.y:.1f} {left:.1f} {p.y:.1f}"
    return Markup('<path class="branch" d="{}H{}" stroke-width="{}"/>').format(
        start, f"{right:.1f}", f"{_stroke(p.branch, of):.1f}"
    )


def _label(p: Placed, ends: float, completions: Sequence[Completion]) -> Markup:
    text = _text(p.branch, completions)
    if not text:
        text = "" if p.parent is None or p.branch.children else "(ends here)"
    room = SHARED if p.branch.children else int((ends - LEFT - p.left - 14) / CELL)
    lift = _stroke(p.branch, len(completions)) / 2 + 5
    return Markup('<text class="run" x="{}" y="{}">{}<title>{}</title></text>').format(
        f"{LEFT + p.left + 4:.1f}", f"{p.y - lift:.1f}", elide(text, max(room, LEAST)), text
    )


def _fork(p: Placed, completions: Sequence[Completion], values: Diverging) -> Markup:
    """Where paths part, the value of what they share: the critic knows no more than that."""
    members = [completions[i] for i in p.branch.completions]
    value = next(c.tokens[p.branch.end].value for c in members if len(c.tokens) > p.branch.end)
    mean = sum(c.score for c in members) / len(members)
    about = f"value {signed(value)}: what the critic expects here\nmean score of these {len(members)}: {signed(mean)}"
    return Markup(
        '<g><title>{}</title><circle cx="{x}" cy="{y}" r="7" fill="{colour}"/>'
        '<text class="value" x="{x}" y="{below}" text-anchor="middle">{value}</text></g>'
    ).format(
        about,
        x=f"{LEFT + p.right:.1f}",
        y=f"{p.y:.1f}",
        colour=values.colour(value),
        below=f"{p.y + 20:.1f}",
        value=signed(value),
    )


def _end(p: Placed, ends: float, completions: Sequence[Completion], scores: Diverging) -> Markup:
    members = [completions[i] for i in p.branch.completions]
    first = members[0]
    times = f" ×{len(members)}" if len(members) > 1 else ""
    about = f"score {signed(first.score)}, KL {signed(first.kl)} nats, {len(first.tokens)} tokens"
    return Markup(
        '<g><title>{}</title><circle cx="{}" cy="{y}" r="9" fill="{}"/><text class="score" x="{}" y="{}">{}</text></g>'
    ).format(
        about,
        f"{ends:.1f}",
        scores.colour(first.score),
        f"{ends + 16:.1f}",
        f"{p.y + 4.5:.1f}",
        f"{signed(first.score)}{times}",
        y=f"{p.y:.1f}",
    )
