"""Plain text for terminals: tables, sizes, and equal rows of neighbouring layers folded into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qtale.memory.sizes import human_bytes

__all__ = ["Row", "describe_groups", "fold", "human_bytes", "ranges", "table"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Row:
    """A line about one module: ``cells`` is what it shows beside its name, ``sizes`` are summed when rows fold."""

    name: str
    cells: tuple[str, ...]
    sizes: tuple[int, ...]
    count: int = 1


def describe_groups(group_size: int) -> str:
    """``channel`` for 0, else the size."""
    return str(group_size) if group_size else "channel"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    rows = [list(header), *(list(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def aligned(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([aligned(rows[0]), rule, *(aligned(row) for row in rows[1:])])


def fold(rows: Iterable[Row]) -> list[Row]:
    """Fold rows that differ only in one number of their name: ``layers.0.up`` … ``layers.3.up`` → ``layers.{0-3}.up``.

    Expert numbers fold before layer numbers. The order is that of first appearance.
    """
    folded = list(rows)
    positions = max((len(_NUMBER.findall(row.name)) for row in folded), default=0)
    for position in reversed(range(positions)):
        folded = _fold_at(folded, position)
    return folded


def _fold_at(rows: list[Row], position: int) -> list[Row]:
    groups: dict[tuple[object, ...], list[tuple[int, Row]]] = {}
    for row in rows:
        parts = re.split(r"\.", row.name)
        numeric = [i for i, part in enumerate(parts) if part.isdigit() or part.startswith("{")]
        if position < len(numeric) and parts[numeric[position]].isdigit():
            number = int(parts[numeric[position]])
            parts[numeric[position]] = "{}"
            key: tuple[object, ...] = (".".join(parts), row.cells, row.count)
        else:
            number, key = -1, (row.name, row.cells, row.count, None)
        groups.setdefault(key, []).append((number, row))
    return [_merged(str(key[0]), members) for key, members in groups.items()]


def _merged(pattern: str, members: list[tuple[int, Row]]) -> Row:
    first = members[0][1]
    if len(members) == 1:
        return first
    numbers = ranges(sorted(number for number, _ in members))
    sizes = tuple(sum(values) for values in zip(*(row.sizes for _, row in members), strict=True))
    return Row(pattern.replace("{}", "{" + numbers + "}", 1), first.cells, sizes, sum(row.count for _, row in members))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: ``[0, 1, 2, 5]`` → ``0-2,5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
