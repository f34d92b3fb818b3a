"""How much a layer's rounding errors count: the scores of importance.json as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qtale.errors import InputError

NO_METRIC = "none"
AUTO = "auto"
BEST = "best"
# In the order in which plans by them measured (benchmarks/README.md); ``auto`` takes the first that the file has.
_PREFERRED = ("kl", "fisher", "noise", "jaccard", "bi", "lim", "error", "zd")
# ``best`` tries this many of them.
_RIVALS = 4
# The least that a layer counts, as a share of the most important one: scores rank layers, none of them is for free.
_FLOOR = 0.01


class Scores(Protocol):
    """What the planner needs of :class:`qtale.importance.Importance`."""

    @property
    def scores(self) -> Mapping[str, Sequence[float]]: ...


def chosen_metric(importance: Scores | None, asked: str, mode: str) -> str:
    """The metric to plan by: ``asked``, or for ``auto`` Jaccard in mode paper and else the first preferred one.

    Without importance it is ``none``: all layers count the same. Raises InputError for scores that are not there.
    """
    if asked == BEST and importance is not None:
        return BEST
    if importance is None or asked == NO_METRIC:
        if asked not in (AUTO, NO_METRIC):
            raise InputError(
                f"plan: metric {asked!r} needs scores; give importance.json of `qtale measure` instead of the model."
            )
        return NO_METRIC
    if asked == AUTO:
        order = ("jaccard", *_PREFERRED) if mode == "paper" else _PREFERRED
        return str(next(name for name in (*order, *importance.scores) if name in importance.scores))
    if asked not in importance.scores:
        raise InputError(f"plan: there are no scores by {asked!r}; there are {', '.join(importance.scores)}.")
    return asked


def rival_metrics(importance: Scores) -> tuple[str, ...]:
    """The metrics whose plans ``best`` compares: the first preferred ones of those that are there."""
    known = [name for name in _PREFERRED if name in importance.scores]
    return tuple(known[:_RIVALS]) or tuple(importance.scores)


def layer_scores(importance: Scores | None, metric: str, num_layers: int) -> tuple[float, ...]:
    """One score for each layer, higher for more important ones; all 1 for the metric ``none``."""
    if importance is None or metric == NO_METRIC:
        return (1.0,) * num_layers
    scores = importance.scores[metric]
    if len(scores) != num_layers:
        raise InputError(f"plan: {len(scores)} scores by {metric!r} are given for a model of {num_layers} layers.")
    return tuple(scores)


def as_factors(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores as factors of errors: shifted to begin at 0 where one is negative, and at least 10 % of the largest."""
    least = min(0.0, *scores)
    shifted = [score - least for score in scores]
    most = max(shifted)
    return tuple(max(score, _FLOOR * most) for score in shifted) if most > 0 else (1.0,) * len(shifted)


def parse_errors(value: Any, where: str) -> dict[int, dict[str, float]]:
    """A table from JSON: bits (as text) → module → a number of 0 or more; InputError for anything else."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object of bits and numbers by module.")
    table: dict[int, dict[str, float]] = {}
    for bits, row in value.items():
        if not str(bits).isdecimal() or not isinstance(row, Mapping):
            raise InputError(f"{where}: {bits!r} must be a number of bits with an object of numbers by module.")
        for module, error in row.items():
            if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < float("inf"):
                raise InputError(f"{where}: {bits} bits of {module} have {error!r}; it must be a number, 0 or more.")
        table[int(bits)] = {str(module): float(error) for module, error in row.items()}
    return table
