"""results.json of ``benchmarks/lsaq.py``: perplexities of mixed bits, checked when they are read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtale.errors import InputError
from qtale.files import read_json

FORMAT = "qtale.results"
VERSION = 1
_NUMBERS = ("average", "bits", "bytes", "perplexity")


@dataclass(frozen=True)
class Point:
    """A method at one average: ``perplexity`` is the mean over its seeds, ``spread`` their standard deviation."""

    method: str
    group_size: int | str
    average: float
    bits: float
    bytes: float
    perplexity: float
    spread: float


@dataclass(frozen=True)
class Results:
    """What was run: ``rows`` have method, seed, average, group_size, bits, bytes and perplexity each."""

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def points(self, group_size: int | str) -> list[Point]:
        """Every method and average with these groups, seeds joined, in the order of the rows."""
        groups: dict[tuple[str, float], dict[Any, Mapping[str, Any]]] = {}
        for row in self.rows:
            if row["group_size"] == group_size:
                groups.setdefault((row["method"], row["average"]), {})[row.get("seed")] = row
        return [_point(list(rows.values())) for rows in groups.values()]

    @property
    def group_sizes(self) -> list[int | str]:
        """Those that occur, in order."""
        return list(dict.fromkeys(row["group_size"] for row in self.rows))

    def check_model(self, fingerprint: str) -> None:
        """Raise InputError unless the model of this fingerprint was run."""
        own = str(self.settings.get("fingerprint", ""))
        if own != fingerprint:
            raise InputError(
                f"report: the results are of another model (fingerprint {own[:19]}) than the importance "
                f"({fingerprint[:19]}); give files of one model."
            )

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """The results in a file; InputError where it is missing, no JSON or not what the benchmark writes."""
        path = Path(path).expanduser()
        return cls.from_json(read_json(path, "benchmarks/lsaq.py"), str(path))

    @classmethod
    def from_json(cls, value: Any, where: str = "results") -> Results:
        """Results from their JSON object, checked; ``where`` names it in errors. Raises InputError."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise InputError(f"{where}: is no result of benchmarks/lsaq.py in format {FORMAT!r}, version {VERSION}.")
        rows = value.get("rows")
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{where}: 'rows' must be a list of at least one result.")
        for number, row in enumerate(rows):
            _check_row(row, f"{where}: row {number}")
        parts = {name: value.get(name, {}) for name in ("settings", "machine")}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise InputError(f"{where}: {name!r} must be a JSON object.")
        return cls(rows, **parts)


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("method"), str) or not row.get("method"):
        raise InputError(f"{where}: must be an object with a 'method'.")
    for name in _NUMBERS:
        number = row.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise InputError(f"{where}: has {name} {number!r}; it must be a number above 0.")
    if type(row.get("group_size")) not in (int, str) or type(row.get("seed")) not in (int, type(None)):
        raise InputError(f"{where}: has group_size {row.get('group_size')!r} and seed {row.get('seed')!r}.")


def _point(rows: Sequence[Mapping[str, Any]]) -> Point:
    first = rows[0]
    values = [row["perplexity"] for row in rows]
    return Point(
        method=first["method"],
        group_size=first["group_size"],
        average=first["average"],
        bits=first["bits"],
        bytes=statistics.fmean(row["bytes"] for row in rows),
        perplexity=statistics.fmean(values),
        spread=statistics.stdev(values) if len(values) > 1 else 0.0,
    )
