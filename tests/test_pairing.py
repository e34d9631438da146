"""tasks.data.pairing against hand-derived numbers and against counting every pair of raters."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.formats import RatedText
from tasks.data.pairing import preference_share, rated_groups

ratings = st.lists(st.integers(-4, 4), min_size=1, max_size=8)


def test_the_share_of_rater_pairs_counts_a_tie_half():
    # (2,1) (2,2) (3,1) (3,2): won, tied, won, won.
    assert preference_share([2, 3], [1, 2]) == 3.5 / 4


@given(ratings, ratings)
def test_the_share_equals_counting_and_is_one_together_with_its_reverse(a, b):
    counted = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b) / (len(a) * len(b))
    assert preference_share(a, b) == pytest.approx(counted)
    assert preference_share(a, b) + preference_share(b, a) == pytest.approx(1)


def texts(*means):
    return [RatedText(f"text {i}", (mean,), row=i) for i, mean in enumerate(means)]


def test_a_group_gives_all_pairs_with_gap_enough_the_higher_rated_first():
    (pairs,) = rated_groups(texts(0.0, 1.0, 1.25, 3.0), group_size=4, min_gap=0.5, draw=random.Random(0))
    found = {(pair.chosen.mean, pair.rejected.mean): (pair.margin, pair.target) for pair in pairs}
    assert found == {(1, 0): (1, 1), (1.25, 0): (1.25, 1), (3, 0): (3, 1), (3, 1): (2, 1), (3, 1.25): (1.75, 1)}


def test_equal_means_are_no_preference_even_without_a_minimal_gap():
    assert list(rated_groups(texts(1.0, 1.0), 2, 0.0, random.Random(0))) == [[]]


def test_every_text_is_in_one_group_and_the_seed_decides_which():
    many = texts(*range(11))
    groups = [list(rated_groups(many, 4, 0.0, random.Random(seed))) for seed in (1, 1, 2)]
    assert groups[0] == groups[1] != groups[2]
    members = [{pair.chosen.row for pair in group} | {pair.rejected.row for pair in group} for group in groups[0]]
    assert sorted(map(len, members)) == [3, 4, 4]
    assert all(a.isdisjoint(b) for a, b in combinations(members, 2))
