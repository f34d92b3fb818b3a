"""Log-likelihoods of continuations: requests that begin alike run what they share once.

The sequences form a radix tree. Each of its edges is a sequence of the decoder that takes over what its parent holds;
edges run in passes of many rows, in depth-first order, and are forgotten once their children have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from qtale.engine.passes import CallReport, Passes, Segment

# Rows of one pass: more gain nothing, and Ctrl-C waits for a layer of them.
SCORE_TOKENS = 512
Request = tuple[list[int], list[int]]


@dataclass(eq=False)
class _Edge:
    """Tokens ``start`` … of a sequence that follow those of ``parent``; ``scored`` are (row, target, request)."""

    parent: _Edge | None
    start: int
    tokens: list[int]
    children: list[_Edge] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    text_length: int = 0
    sequence: int = -1
    left: int = 0


def loglikelihoods(
    passes: Passes,
    requests: Sequence[Request],
    report: CallReport,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """(sum of natural log-probabilities, whether greedy decoding gives it) of each (context, continuation).

    Contexts and continuations hold a token or more. ``progress`` shows a bar of the tokens that run, shared ones once.
    """
    sums, greedy = [0.0] * len(requests), [True] * len(requests)
    edges = list(_preorder(_tree(requests, passes.depends_on_length)))
    total = sum(len(edge.tokens) for edge in edges)
    open_sequences: set[int] = set()
    try:
        with tqdm(total=total, desc="scoring", unit="token", delay=1, disable=not progress) as bar:
            for members in _packed(edges):
                _run(passes, members, report, open_sequences, sums, greedy)
                bar.update(sum(count for _, _, count in members))
    finally:
        for sequence in open_sequences:
            passes.remove(sequence)
    return list(zip(sums, greedy, strict=True))


def _tree(requests: Sequence[Request], stands_alone: Callable[[int], bool]) -> list[_Edge]:
    """The roots of a radix tree over (context + continuation) without its last token, which predicts nothing.

    Sequences whose length says that they share nothing are roots.
    """
    sequences = [(context + continuation)[:-1] for context, continuation in requests]
    roots: list[_Edge] = []
    alone: list[_Edge] = []
    path: list[_Edge] = []
    last: list[int] = []
    for index in sorted(range(len(requests)), key=sequences.__getitem__):
        sequence = sequences[index]
        if stands_alone(len(sequence)):
            if not alone or alone[-1].tokens != sequence:
                alone.append(_Edge(None, 0, sequence, text_length=len(sequence)))
            _mark(alone[-1:], index, requests[index])
            continue
        shared = _common_prefix(last, sequence)
        while path and path[-1].start >= shared and path[-1].start:
            path.pop()
        if path and not shared:
            path.clear()
        if path and path[-1].start + len(path[-1].tokens) > shared:
            path[-1] = _split(path[-1], shared, roots)
        if shared < len(sequence):
            parent = path[-1] if path else None
            edge = _Edge(parent, shared, sequence[shared:])
            (roots if parent is None else parent.children).append(edge)
            path.append(edge)
        _mark(path, index, requests[index])
        last = sequence
    return roots + alone


def _split(edge: _Edge, shared: int, roots: list[_Edge]) -> _Edge:
    """Cut an edge at position ``shared``; returns the upper part, whose only child is the lower one."""
    cut = shared - edge.start
    upper = _Edge(edge.parent, edge.start, edge.tokens[:cut], [edge])
    # Sequences come sorted, so the edge that is cut is the last of its siblings.
    (roots if edge.parent is None else edge.parent.children)[-1] = upper
    upper.scored = [mark for mark in edge.scored if mark[0] < cut]
    edge.scored = [(row - cut, target, request) for row, target, request in edge.scored if row >= cut]
    edge.parent, edge.start, edge.tokens = upper, shared, edge.tokens[cut:]
    return upper


def _mark(path: Sequence[_Edge], index: int, request: Request) -> None:
    """Note on the edges of ``path`` which rows predict the continuation."""
    context, continuation = request
    for edge in path:
        first = max(edge.start, len(context) - 1)
        last = min(edge.start + len(edge.tokens), len(context) + len(continuation) - 1)
        for position in range(first, last):
            edge.scored.append((position - edge.start, continuation[position - len(context) + 1], index))


def _preorder(roots: Sequence[_Edge]) -> Iterator[_Edge]:
    stack = list(reversed(roots))
    while stack:
        edge = stack.pop()
        yield edge
        stack.extend(reversed(edge.children))


def _packed(edges: Sequence[_Edge]) -> Iterator[list[tuple[_Edge, int, int]]]:
    """Passes of at most SCORE_TOKENS rows: (edge, first token, count), edges in order."""
    members: list[tuple[_Edge, int, int]] = []
    room = SCORE_TOKENS
    for edge in edges:
        at = 0
        while at < len(edge.tokens):
            count = min(room, len(edge.tokens) - at)
            members.append((edge, at, count))
            at, room = at + count, room - count
            if not room:
                yield members
                members, room = [], SCORE_TOKENS
    if members:
        yield members


def _run(
    passes: Passes,
    members: Sequence[tuple[_Edge, int, int]],
    report: CallReport,
    open_sequences: set[int],
    sums: list[float],
    greedy: list[bool],
) -> None:
    segments: list[Segment] = []
    tokens: list[int] = []
    marks: list[tuple[int, int, int]] = []
    for edge, at, count in members:
        parent = -1
        if at == 0:
            edge.sequence = passes.add()
            open_sequences.add(edge.sequence)
            edge.left = len(edge.children)
            parent = -1 if edge.parent is None else edge.parent.sequence
        segments.append(Segment(edge.sequence, parent, count, edge.text_length))
        base = len(tokens) - at
        marks += [(base + row, target, index) for row, target, index in edge.scored if at <= row < at + count]
        tokens += edge.tokens[at : at + count]
    marks.sort()
    rows = np.array([row for row, _, _ in marks], dtype=np.int64)
    targets = np.array([target for _, target, _ in marks], dtype=np.int32)
    values, best = passes.score(segments, tokens, rows, targets, report)
    for (_, _, request), value, is_best in zip(marks, values.tolist(), best.tolist(), strict=True):
        sums[request] += value
        greedy[request] = greedy[request] and is_best
    _forget(passes, members, open_sequences)


def _forget(passes: Passes, members: Sequence[tuple[_Edge, int, int]], open_sequences: set[int]) -> None:
    """Remove the sequences that nothing follows any more."""
    for edge, at, count in members:
        if at == 0 and edge.parent is not None:
            edge.parent.left -= 1
            _close(passes, edge.parent, open_sequences)
        if at + count == len(edge.tokens):
            _close(passes, edge, open_sequences)


def _close(passes: Passes, edge: _Edge, open_sequences: set[int]) -> None:
    if not edge.left and edge.sequence in open_sequences:
        # In this order, so that what Ctrl-C falls between is removed again.
        passes.remove(edge.sequence)
        open_sequences.discard(edge.sequence)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
