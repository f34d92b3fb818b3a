"""importance.json: the scores of every layer, how they were measured, and what they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtale.errors import InputError
from qtale.files import read_json, write_whole

FORMAT = "qtale.importance"
VERSION = 1


@dataclass(frozen=True)
class Importance:
    """What ``measure`` found. Scores are one number per layer, by metric; higher means more important, for all.

    * ``model``: fingerprint, path, model_type, num_layers; ``data``: where the tokens came from and their fingerprint.
    * ``settings``: those of :class:`qtale.importance.MeasureOptions`.
    * ``per_sequence``: metric → sequence → layer, for metrics that are means over sequences.
    * ``token_sets``: sequence → layer boundary (before layer 0, …, after the last) → token numbers, the largest
      product first; ``words``: what those tokens are, by number.
    * ``tokens``: the sequences of the scores from the loss, token numbers; plans are tried on them.
    * ``errors``: bits → module → |ŵ - w|² / |w|² of rounding to nearest.
    * ``module_costs``: metric → bits → module → predicted loss increase in nats per token (metrics "fisher" and,
      measured with it, "kl").
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Mapping[str, Sequence[float]]
    per_sequence: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    module_costs: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    token_sets: Sequence[Sequence[Sequence[int]]] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    tokens: Sequence[Sequence[int]] = ()

    def _of(self, metric: str) -> Sequence[float]:
        if metric not in self.scores:
            raise InputError(f"importance: has no scores by {metric!r}; it has {', '.join(self.scores)}.")
        return self.scores[metric]

    def ranking(self, metric: str) -> list[int]:
        """Layers from the most important to the least; of equal ones the first comes first."""
        scores = self._of(metric)
        return sorted(range(len(scores)), key=lambda layer: -scores[layer])

    def spread(self, metric: str) -> list[float]:
        """Standard error of each layer's score over the calibration sequences.

        Raises InputError for a metric that is no mean over sequences, and where there was one sequence only.
        """
        self._of(metric)
        rows = self.per_sequence.get(metric)
        if not rows:
            raise InputError(f"importance: {metric!r} is not a mean over sequences, so it has no spread over them.")
        if len(rows) < 2:
            raise InputError(f"importance: one sequence has no spread; measure {metric!r} with two or more.")
        errors = []
        for column in zip(*rows, strict=True):
            mean = math.fsum(column) / len(column)
            variance = math.fsum((value - mean) ** 2 for value in column) / (len(column) - 1)
            errors.append(math.sqrt(variance / len(column)))
        return errors

    def check_model(self, fingerprint: str) -> None:
        """Raise InputError unless this was measured on the model of this ``qtale.checkpoint.fingerprint``."""
        if fingerprint != self.model["fingerprint"]:
            raise InputError(
                f"importance: was measured on another model (fingerprint {self.model['fingerprint'][:12]}, "
                f"{self.model['path']}), not on this one ({fingerprint[:12]}); measure this model."
            )

    def to_json(self) -> dict[str, Any]:
        """The object that importance.json holds."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT, "version": VERSION, **fields}

    def write(self, path: str | Path) -> None:
        """Write importance.json; InputError where the file exists, Error where it cannot be written."""
        path = Path(path).expanduser()
        check_new(path)
        lines = (f"  {json.dumps(key)}: {_text(value)}" for key, value in self.to_json().items())
        write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: str | Path) -> Importance:
        """The content of a file; InputError where it is missing, no JSON, or not what ``write`` writes."""
        path = Path(path).expanduser()
        return cls.from_json(read_json(path, "`qtale measure`"), str(path))

    @classmethod
    def from_json(cls, value: Any, where: str = "importance") -> Importance:
        """The object that :meth:`to_json` gives, checked; ``where`` names it in errors. Raises InputError."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{where}: is no measurement; one is a JSON object whose 'format' is {FORMAT!r}.")
        if value.get("version") != VERSION:
            raise InputError(f"{where}: has version {value.get('version')!r}; this qtale reads version {VERSION}.")
        fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        for name in ("model", "data", "settings", "scores", "per_sequence", "errors", "module_costs", "words"):
            if not isinstance(fields.get(name, {}), dict):
                raise InputError(f"{where}: {name!r} must be a JSON object.")
        layers = fields.get("model", {}).get("num_layers")
        if not isinstance(fields.get("model", {}).get("fingerprint"), str) or not isinstance(layers, int):
            raise InputError(f"{where}: 'model' must name a fingerprint and num_layers.")
        _check_scores(fields.get("scores", {}), layers, where)
        _check_tokens(fields.get("tokens", []), where)
        return cls(**{"data": {}, "settings": {}, **fields})


def check_new(path: Path) -> None:
    """Raise InputError where ``path`` exists or its folder does not: qtale never overwrites a result."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: exists already; give another file or remove it first.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist; create it first.")


def _check_scores(scores: Mapping[str, Any], layers: int, where: str) -> None:
    if not scores:
        raise InputError(f"{where}: has no 'scores'.")
    for metric, values in scores.items():
        if not isinstance(values, list) or len(values) != layers:
            raise InputError(f"{where}: scores by {metric!r} must be a list of {layers} numbers, one per layer.")
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in values):
            raise InputError(f"{where}: scores by {metric!r} must be finite numbers.")


def _check_tokens(tokens: Any, where: str) -> None:
    rows: list[Any] = tokens if isinstance(tokens, list) else [None]
    lists = all(isinstance(row, list) for row in rows) and len({len(row) for row in rows}) <= 1
    if not lists or any(type(token) is not int or token < 0 for row in rows for token in row):
        raise InputError(f"{where}: 'tokens' must be lists of token numbers, all of the same length.")


def _text(value: Any) -> str:
    """JSON with the inner parts of a dictionary or list on a line each."""
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(part, (Mapping, list, tuple)) for part in value.values())
    ):
        parts = (f"    {json.dumps(key)}: {json.dumps(part)}" for key, part in value.items())
        return "{\n" + ",\n".join(parts) + "\n  }"
    return json.dumps(value, ensure_ascii=False)
