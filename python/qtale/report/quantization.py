"""What ``qtale quantize --json`` prints: the error of every matrix and the time it took, checked when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale import names
from qtale.errors import InputError
from qtale.files import read_json
from qtale.ptq.worklist import REPORT_FORMAT, REPORT_VERSION, QuantizeReport

_MAKER = "`qtale quantize --json`"


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix: its ``layer``, the ``module`` inside of it, and what is known of its error.

    ``error`` is that of the outputs where the method was calibrated (``nearest`` is then that of rounding to nearest),
    else that of the weights; see :class:`qtale.ptq.LayerRow`. ``seconds`` are 0 where none were taken.
    """

    layer: int
    module: str
    num_bits: int
    error: float
    nearest: float | None
    seconds: float


@dataclass(frozen=True)
class Quantization:
    """Matrices of all decoder layers in order; ``totals`` has the report's sizes."""

    model: str
    matrices: Sequence[Matrix]
    totals: Mapping[str, float]

    @property
    def num_layers(self) -> int:
        return 1 + max(matrix.layer for matrix in self.matrices)

    @property
    def calibrated(self) -> bool:
        """Whether every matrix has the error of rounding to nearest beside its own."""
        return all(matrix.nearest is not None for matrix in self.matrices)

    def by_module(self) -> dict[str, list[Matrix]]:
        """The matrices of each module by layer."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.module, []).append(matrix)
        return found

    def seconds_by_layer(self) -> list[float]:
        """What solving took, for every layer."""
        found = [0.0] * self.num_layers
        for matrix in self.matrices:
            found[matrix.layer] += matrix.seconds
        return found

    @classmethod
    def of(cls, report: QuantizeReport) -> Quantization:
        """What a finished quantization reports; InputError for a dry run, which has no errors."""
        return cls.from_json(report.to_json(), "quantize")

    @classmethod
    def read(cls, path: str | Path) -> Quantization:
        """The content of a file; InputError where it is missing, no JSON, or not what ``qtale quantize`` prints."""
        path = Path(path).expanduser()
        return cls.from_json(read_json(path, _MAKER), str(path))

    @classmethod
    def from_json(cls, value: Any, where: str = "quantization") -> Quantization:
        """Matrices from the report's JSON object, checked; ``where`` names it in errors. Raises InputError."""
        if (
            not isinstance(value, dict)
            or value.get("format") != REPORT_FORMAT
            or value.get("version") != REPORT_VERSION
        ):
            raise InputError(f"{where}: is no output of {_MAKER} in format {REPORT_FORMAT}, version {REPORT_VERSION}.")
        if value.get("dry_run") is not False:
            raise InputError(f"{where}: is of a dry run, which has no errors to show; quantize without --dry-run.")
        rows = value.get("layers")
        if not isinstance(rows, list | tuple):
            raise InputError(f"{where}: 'layers' must be a list.")
        matrices = [_matrix(row, f"{where}: layer {number}") for number, row in enumerate(rows)]
        inside = [matrix for matrix in matrices if matrix is not None]
        if not inside:
            raise InputError(f"{where}: has no matrix of a decoder layer.")
        sizes = ("bytes_before", "bytes_after", "bits_per_weight")
        return cls(str(value.get("model", "")), inside, {name: _number(value, name, where) or 0.0 for name in sizes})


def _matrix(row: Any, where: str) -> Matrix | None:
    """A row of the report; None outside of the decoder layers, as for a head."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or type(row.get("num_bits")) is not int:
        raise InputError(f"{where}: must be an object with a 'name' and 'num_bits'.")
    place = names.split_block(row["name"])
    if place is None:
        return None
    outputs, weights = (_number(row, name, where) for name in ("output_error", "error"))
    error = outputs if outputs is not None else weights
    if error is None:
        raise InputError(f"{where}: {row['name']} has neither 'output_error' nor 'error'.")
    nearest = _number(row, "rtn_output_error", where) if outputs is not None else None
    return Matrix(*place, row["num_bits"], error, nearest, _number(row, "seconds", where) or 0.0)


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{where}: has {name} {value!r}; it must be a number of at least 0.")
    return float(value)
