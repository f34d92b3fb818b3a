"""Packs token sequences that begin alike into one prefix tree, so that a model reads every shared token once.

A tree is one batch row: each node is a token at the position of its depth, and attends to its ancestors and itself.
A causal model with positions and a custom mask computes at each node what it computes in the plain sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# A pass may grow to this many times its budget while what it shares outweighs what it adds.
_SHARED_GROWTH = 4


@dataclass
class PrefixTree:
    """Tokens of one pass: ``paths[i]`` are the nodes of the sequence ``members[i]``, root first."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    paths: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(self, member: int, sequence: Sequence[int], shared: int) -> None:
        """Add a sequence whose first ``shared`` tokens are those of the sequence added last."""
        start, new = len(self.tokens), len(sequence) - shared
        self.tokens.extend(sequence[shared:])
        self.positions.extend(range(shared, len(sequence)))
        grown = np.arange(start, start + new, dtype=np.int32)
        path = np.concatenate([self.paths[-1][:shared], grown]) if shared and new else grown
        # A view where nothing is new, as for the choices of one token that share their question.
        self.paths.append(path if new else self.paths[-1][:shared])
        self.members.append(member)

    @property
    def is_chain(self) -> bool:
        """Whether the tree is one sequence, for which a plain causal mask will do."""
        return len(self.paths[-1]) == len(self.tokens)

    def mask(self) -> npt.NDArray[np.bool_]:
        """[nodes, nodes]: whether the row's node attends to the column's."""
        allowed = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        done = 0
        for path in self.paths:
            new = path[path >= done]
            allowed[np.ix_(new, path[: len(path) - len(new)])] = True
            allowed[np.ix_(new, new)] = np.tri(len(new), dtype=bool)
            done += len(new)
        return allowed


def pack(sequences: Sequence[Sequence[int]], budget: int, max_members: int | None = None) -> Iterator[PrefixTree]:
    """Split sequences into trees of about ``budget`` nodes, at most ``max_members`` sequences each.

    Sequences are taken in lexicographic order, which puts those that begin alike side by side. A single longer one gets
    a tree of its own size.
    """
    tree, last = PrefixTree(), tuple[int, ...]()
    for member in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        sequence = tuple(sequences[member])
        shared = _common_prefix(last, sequence)
        new = len(sequence) - shared
        limit = budget if shared < new else _SHARED_GROWTH * budget + shared
        full = len(tree.members) == max_members or len(tree.tokens) + new > limit
        if tree.members and full:
            yield tree
            tree, shared = PrefixTree(), 0
        tree.add(member, sequence, shared)
        last = sequence
    if tree.members:
        yield tree


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
