"""tasks.data.splits: nothing that hangs together is torn apart, and nothing is lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.splits import components, distinct, normal, share_out, take_exactly

links = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple), max_size=20)
groups = st.lists(st.lists(st.integers(), min_size=1, max_size=5), max_size=30)
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_case_and_white_space_make_no_other_text():
    assert normal("  A   Fine\tfilm\n") == normal("a fine film") != normal("a fine film!")


def test_distinct_keeps_the_first():
    assert distinct(["Ab", "c", "aB"], str.lower) == ["Ab", "c"]


def test_what_shares_a_link_through_others_is_one_component():
    chain = [("a", "b"), ("x",), ("b", "c"), ("c", "d")]
    assert components(chain, lambda item: item) == [[("a", "b"), ("b", "c"), ("c", "d")], [("x",)]]


@given(links)
def test_components_equal_merging_until_nothing_changes(items):
    merged = [set(item) for item in items]
    for link in range(13):
        touching = [group for group in merged if link in group]
        merged = [group for group in merged if link not in group] + ([set().union(*touching)] if touching else [])
    found = [set().union(*map(set, group)) for group in components(items, lambda item: item)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, merged))


@given(groups, st.integers())
def test_share_out_gives_every_group_to_one_split_whole(parts, seed):
    given = share_out(parts, SHARES, random.Random(seed))
    assert sorted(group for split in given.values() for group in split) == sorted(parts)


def test_share_out_meets_the_shares_when_groups_are_small_and_depends_on_the_seed_alone():
    parts = [[i] for i in range(1000)]
    first, again, other = (share_out(parts, SHARES, random.Random(seed)) for seed in (1, 1, 2))
    assert {split: len(given) for split, given in first.items()} == {"a": 500, "b": 300, "c": 200}
    assert first == again != other


def test_one_large_group_goes_where_most_is_lacking():
    given = share_out([[0] * 6, *([i] for i in range(4))], SHARES, random.Random(0))
    assert given["a"] == [[0] * 6]


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 1, 1, 1, 4]])
def test_take_exactly_fills_the_counts_and_never_exceeds_them(sizes):
    parts = [[i] * size for i, size in enumerate(sizes)]
    given = take_exactly(parts, {"test": 3, "dev": 2}, rest="ppo")
    assert sum(map(len, given["test"])) == 3
    assert sum(map(len, given["dev"])) == 2
    assert sorted(group for split in given.values() for group in split) == sorted(parts)
