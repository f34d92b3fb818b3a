"""What a module at some bits is expected to lose: importance of its layer times its rounding error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtale.errors import UnsupportedError
from qtale.importance.file import Importance
from qtale.memory.shape import LinearShape
from qtale.planner.items import layer_of
from qtale.planner.losses import ErrorTable, error_table
from qtale.planner.options import AUTO, Options
from qtale.planner.plan import HEAD
from qtale.planner.scores import as_factors, layer_scores, parse_errors
from qtale.planner.source import Source


@dataclass(frozen=True)
class ExpectedLoss:
    """Losses by module and bits: ``costs`` where the metric predicts them itself, else factor times error.

    ``factors`` has one number for each layer. The head counts as much as the most important layer.
    """

    factors: tuple[float, ...]
    errors: ErrorTable
    costs: ErrorTable

    @classmethod
    def make(
        cls, source: Source, options: Options, metric: str, file: str | Path | None, progress: bool
    ) -> ExpectedLoss:
        """Losses for every choice of the options; rounding errors that nobody has measured yet are computed.

        Raises UnsupportedError for a model without weights and whatever :func:`error_table` raises.
        """
        importance, shape = source.importance, source.shape
        known = _measured_errors(importance, options)
        if source.folder is None:
            raise UnsupportedError(
                f"plan: mode {options.mode} weighs rounding errors, which need the weights; give the model's folder, "
                "or use mode paper or uniform, which plan from a config alone."
            )
        linears = [*shape.linears, *([shape.head] if shape.head is not None and options.head_bits == AUTO else [])]
        choices = options.choices or ()
        errors = error_table(source.folder, linears, choices, options, known=known, file=file, progress=progress)
        scores = layer_scores(importance, metric, shape.num_layers)
        return cls(as_factors(scores), errors, _costs(importance, metric, options, errors))

    def of(self, linear: LinearShape, bits: int) -> float:
        """The loss of one Linear at ``bits``; 0 at 16, which leave it as stored."""
        if bits == 16:
            return 0.0
        predicted = self.costs.get(bits, {}).get(linear.name)
        if predicted is not None:
            return predicted
        factor = max(self.factors) if linear.name == HEAD else self.factors[layer_of(linear.name)]
        return factor * self.errors[bits][linear.name]


def _measured_errors(importance: Importance | None, options: Options) -> ErrorTable:
    if importance is None or not _same_rounding(importance, options):
        return {}
    return parse_errors(importance.errors, "importance: 'errors'")


def _same_rounding(importance: Importance, options: Options) -> bool:
    return options.symmetric and importance.settings.get("group_size") == options.group_size


def _costs(importance: Importance | None, metric: str, options: Options, errors: ErrorTable) -> ErrorTable:
    """The metric's own predictions, in proportion to the errors where those were measured with other groups."""
    if importance is None or metric not in importance.module_costs:
        return {}
    costs = parse_errors(importance.module_costs[metric], f"importance: 'module_costs' of {metric!r}")
    if _same_rounding(importance, options):
        return costs
    measured = parse_errors(importance.errors, "importance: 'errors'")
    return {bits: _rescaled(row, errors.get(bits, {}), measured.get(bits, {})) for bits, row in costs.items()}


def _rescaled(row: Mapping[str, float], errors: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    return {
        name: cost * errors[name] / measured[name]
        for name, cost in row.items()
        if errors.get(name) and measured.get(name)
    }
