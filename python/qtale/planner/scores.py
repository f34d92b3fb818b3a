"""importance.json as the planner reads it: one score for each layer and metric, higher meaning more important."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale.checkpoint.index import read_json_object
from qtale.errors import InputError

FORMAT = "qtale.importance"
NO_METRIC = "none"
# Metrics by what they have to say about rounding errors; those of a file that stand here first are taken first.
PREFERRED = ("fisher", "noise", "jaccard", "lim", "bi", "zd")
# The least that a layer counts, as a share of the most important one.
_FLOOR = 0.01

ErrorTable = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Importance:
    """Scores of one model's layers; ``errors`` is bits → module → squared quantization error, empty if not measured."""

    path: Path
    fingerprint: str
    model_path: str
    num_layers: int
    scores: Mapping[str, tuple[float, ...]]
    errors: ErrorTable

    def metric(self, asked: str, mode: str) -> str:
        """The metric to use: ``asked``, or for ``auto`` Jaccard in mode paper and else the first preferred one.

        Raises InputError naming the metrics of the file where it lacks the one that is asked for.
        """
        order = ("jaccard", *PREFERRED) if mode == "paper" else PREFERRED
        chosen = next((name for name in (*order, *self.scores) if name in self.scores), asked)
        if asked != "auto":
            chosen = asked
        if chosen not in self.scores:
            raise InputError(f"{self.path}: has no scores of {chosen!r}; it holds {', '.join(self.scores) or 'none'}.")
        return chosen


def read_importance(path: Path) -> Importance:
    """Read importance.json; raises InputError where it is none, or scores are not one finite number for each layer."""
    value = read_json_object(path)
    if value.get("format") != FORMAT or value.get("version") != 1:
        raise InputError(
            f"{path}: is no importance file of version 1 (its 'format' is {value.get('format')!r}); make one with "
            "`qtale measure`."
        )
    model = value.get("model")
    if not isinstance(model, Mapping) or not all(isinstance(model.get(key), str) for key in ("fingerprint", "path")):
        raise InputError(f"{path}: 'model' must hold the fingerprint and path of the model.")
    count = model.get("num_layers")
    if type(count) is not int or count < 1:
        raise InputError(f"{path}: num_layers is {count!r}; it must be 1 or more.")
    scores = value.get("scores")
    if not isinstance(scores, Mapping):
        raise InputError(f"{path}: 'scores' must be an object of metrics and their scores by layer.")
    parsed = {str(name): _row(row, count, f"{path}: scores of {name!r}") for name, row in scores.items()}
    errors = _errors(value.get("errors") or {}, path)
    return Importance(path, model["fingerprint"], model["path"], count, parsed, errors)


def layer_weights(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores as factors of errors: shifted to begin at 0 where one is negative, and at least 1 % of the largest."""
    least = min(0.0, *scores)
    shifted = [score - least for score in scores]
    most = max(shifted)
    return tuple(max(score / most, _FLOOR) for score in shifted) if most > 0 else (1.0,) * len(shifted)


def parse_errors(value: Any, where: str) -> dict[int, dict[str, float]]:
    """An error table from JSON: bits (as text) → module → a number of 0 or more; InputError for anything else."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object of bits and errors by module.")
    table: dict[int, dict[str, float]] = {}
    for bits, row in value.items():
        if not str(bits).isdecimal() or not isinstance(row, Mapping):
            raise InputError(f"{where}: {bits!r} must be a number of bits with an object of errors by module.")
        for module, error in row.items():
            if not _is_number(error) or error < 0:
                raise InputError(f"{where}: {bits} bits of {module} have the error {error!r}; it must be 0 or more.")
        table[int(bits)] = {str(module): float(error) for module, error in row.items()}
    return table


def _errors(value: Any, path: Path) -> ErrorTable:
    return parse_errors(value, f"{path}: 'errors'")


def _row(row: Any, count: int, where: str) -> tuple[float, ...]:
    if not isinstance(row, list) or len(row) != count or not all(map(_is_number, row)):
        raise InputError(f"{where} must be a list of {count} finite numbers, one for each layer.")
    return tuple(map(float, row))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
