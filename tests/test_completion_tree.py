"""Paths that part where tokens differ, against trees drawn by hand."""

from __future__ import annotations

import pytest

from tasks.inspector.tree import Branch, grow, leaves, place

#              1 2 ┬ 3
#            ┌─────┼ 4 5 (twice)
#  (nothing) ┤     └ (ends here)
#            └ 7
FIVE = [[1, 2, 3], [1, 2, 4, 5], [7], [1, 2, 4, 5], [1, 2]]
INNER = Branch(0, 2, (0, 1, 3, 4), (Branch(2, 3, (0,)), Branch(2, 4, (1, 3)), Branch(2, 2, (4,))))
DRAWN = Branch(0, 0, (0, 1, 2, 3, 4), (INNER, Branch(0, 1, (2,))))


def test_paths_part_where_tokens_differ() -> None:
    assert grow(FIVE) == DRAWN


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[1, 2, 3]], Branch(0, 3, (0,))),
        ([[1, 2], [1, 2]], Branch(0, 2, (0, 1))),
        ([[1, 2], [1]], Branch(0, 1, (0, 1), (Branch(1, 2, (0,)), Branch(1, 1, (1,))))),
        ([[1], [], [1]], Branch(0, 0, (0, 1, 2), (Branch(0, 1, (0, 2)), Branch(0, 0, (1,))))),
        ([[1, 9, 3], [2, 9, 3]], Branch(0, 0, (0, 1), (Branch(0, 3, (0,)), Branch(0, 3, (1,))))),
    ],
    ids=["one", "identical", "one inside another", "an empty one", "the same again after a difference"],
)
def test_corner_cases(sequences: list[list[int]], expected: Branch) -> None:
    assert grow(sequences) == expected


def test_leaves_come_from_top_to_bottom() -> None:
    assert [leaf.completions for leaf in leaves(DRAWN)] == [(0,), (1, 3), (4,), (2,)]


def test_forks_stand_amid_their_children_and_no_two_lines_cross() -> None:
    placed = place(DRAWN, lambda branch: 10.0 * (branch.end - branch.start), row=20, gap=5)
    found = {p.branch.completions: (p.left, p.right, p.y, p.parent) for p in placed}
    assert found == {
        (0, 1, 2, 3, 4): (0, 0, 50, None),  # between 30 and 70
        (0, 1, 3, 4): (5, 25, 30, (0, 50)),  # between 10 and 50
        (0,): (30, 40, 10, (25, 30)),
        (1, 3): (30, 50, 30, (25, 30)),
        (4,): (30, 30, 50, (25, 30)),
        (2,): (5, 15, 70, (0, 50)),
    }
