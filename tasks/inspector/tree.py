"""Completions of one prompt as a tree of paths that part where their tokens differ: its shape and its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Branch:
    """Tokens `start` to `end` (excluded), which these completions share; then they part, or all of them are over."""

    start: int
    end: int
    completions: tuple[int, ...]
    """Their places in what was given, in order."""
    children: tuple[Branch, ...] = ()
    """In the order of their first completions. Where one path ends inside another, its child has no token."""


@dataclass(frozen=True)
class Placed:
    """A branch in the picture: from (`left`, `y`) to (`right`, `y`), after the fork at `parent`."""

    branch: Branch
    left: float
    right: float
    y: float
    parent: tuple[float, float] | None
    """x and y of the end of the branch that it grows from; None for the root."""


def grow(sequences: Sequence[Sequence[int]]) -> Branch:
    """The prefix tree of at least one sequence of token ids."""
    return _grow(sequences, tuple(range(len(sequences))), 0)


def leaves(branch: Branch) -> Iterator[Branch]:
    """The ends of all paths, from top to bottom."""
    if not branch.children:
        yield branch
    for child in branch.children:
        yield from leaves(child)


def place(root: Branch, width: Callable[[Branch], float], row: float, gap: float) -> list[Placed]:
    """Every branch in the picture, parents first: leaves in rows of height `row`, forks amid their children.

    `width` is that of a branch's own line, `gap` the way from a fork to the lines that grow from it.
    """
    rows = {id(leaf): (i + 0.5) * row for i, leaf in enumerate(leaves(root))}
    placed: list[Placed] = []

    def height(branch: Branch) -> float:
        if not branch.children:
            return rows[id(branch)]
        return (height(branch.children[0]) + height(branch.children[-1])) / 2

    def put(branch: Branch, left: float, parent: tuple[float, float] | None) -> None:
        y, right = height(branch), left + width(branch)
        placed.append(Placed(branch, left, right, y, parent))
        for child in branch.children:
            put(child, right + gap, (right, y))

    put(root, 0.0, None)
    return placed


def _grow(sequences: Sequence[Sequence[int]], members: tuple[int, ...], start: int) -> Branch:
    end = start
    shortest = min(len(sequences[i]) for i in members)
    while end < shortest and len({sequences[i][end] for i in members}) == 1:
        end += 1
    groups: dict[int | None, list[int]] = {}
    for i in members:
        groups.setdefault(sequences[i][end] if end < len(sequences[i]) else None, []).append(i)
    if len(groups) == 1:  # all are over
        return Branch(start, end, members)
    return Branch(start, end, members, tuple(_grow(sequences, tuple(group), end) for group in groups.values()))
