"""Prefix trees: what is packed, what attends to what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale.integrations.prefix_tree import PrefixTree, pack

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


def _sequence_of(tree: PrefixTree, path: np.ndarray) -> list[int]:
    return [tree.tokens[node] for node in path]


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(1, 30), st.sampled_from([None, 1, 3]))
def test_every_sequence_lies_in_one_tree(sequences: list[list[int]], budget: int, most: int | None) -> None:
    trees = list(pack(sequences, budget, most))
    members = [member for tree in trees for member in tree.members]
    assert sorted(members) == list(range(len(sequences)))
    for tree in trees:
        assert most is None or len(tree.members) <= most
        for member, path in zip(tree.members, tree.paths, strict=True):
            assert _sequence_of(tree, path) == sequences[member]
            assert [tree.positions[node] for node in path] == list(range(len(path)))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_a_node_attends_to_its_ancestors_and_itself_alone(sequences: list[list[int]]) -> None:
    (tree,) = pack(sequences, 10**6)
    expected = np.zeros((len(tree.tokens), len(tree.tokens)), dtype=bool)
    for path in tree.paths:
        for depth, node in enumerate(path):
            expected[node, path[: depth + 1]] = True
    np.testing.assert_array_equal(tree.mask(), expected)


def test_shared_tokens_are_stored_once() -> None:
    (tree,) = pack([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9], [1, 2, 3, 4]], 100)
    assert len(tree.tokens) == len([1, 2, 3, 4, 5, 9])
    assert not tree.is_chain


def test_a_chain_is_one_sequence_and_its_beginnings() -> None:
    (chain,) = pack([[1, 2, 3], [1, 2], [1, 2, 3]], 100)
    assert len(chain.tokens) == 3
    assert chain.is_chain
    (single,) = pack([[4, 5, 6]], 2)
    assert single.is_chain


@pytest.mark.parametrize(("shared", "trees"), [(0, 4), (90, 1)])
def test_a_long_shared_beginning_may_exceed_the_budget(shared: int, trees: int) -> None:
    sequences = [[0] * shared + [which + 1] * 30 for which in range(4)]
    assert len(list(pack(sequences, 40))) == trees
