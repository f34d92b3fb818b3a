"""Squared rounding errors of every module and bit width, from the weights on disk, kept in a file between runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.identity import fingerprint
from qtale.checkpoint.index import read_json_object
from qtale.errors import CheckpointError, InputError
from qtale.files import write_whole
from qtale.memory.shape import LinearShape
from qtale.planner.options import Options
from qtale.planner.scores import parse_errors

FORMAT = "qtale.errors"
ErrorTable = Mapping[int, Mapping[str, float]]
_logger = logging.getLogger("qtale")


def error_table(
    folder: ModelFolder,
    linears: Sequence[LinearShape],
    bits: Iterable[int],
    options: Options,
    *,
    known: ErrorTable | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> ErrorTable:
    """Bits → module → |ŵ - w|² / |w|² of rounding to nearest, one tensor in memory at a time; 16 bits have none.

    ``known`` is part of the table already. ``file`` keeps it: what it holds for this model, groups and symmetry is not
    computed again, and what it lacks is added. Raises InputError where the file belongs to another model or other
    groups, CheckpointError for NaN or infinite weights.
    """
    path = None if file is None else Path(file).expanduser()
    table = {width: dict(row) for width, row in (known or {}).items()}
    for width, row in (_read(path, folder, options) if path is not None and path.exists() else {}).items():
        table.setdefault(width, {}).update(row)
    missing = [
        (linear, width)
        for linear in linears
        for width in sorted(set(bits) - {16})
        if linear.name not in table.get(width, {})
    ]
    if missing:
        _compute(folder, missing, options, table, progress)
        if path is not None:
            write_whole(path, _text(folder, options, table))
    return table


def _compute(
    folder: ModelFolder,
    missing: Sequence[tuple[LinearShape, int]],
    options: Options,
    table: dict[int, dict[str, float]],
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    from qtale.ptq.rtn import relative_error, round_to_nearest

    name, weight = "", None
    for linear, width in tqdm(missing, desc="errors", unit="module", delay=1, disable=not progress):
        if weight is None or name != linear.name:
            name, weight = linear.name, folder.torch(f"{linear.name}.weight")
        spec = options.spec(width)
        if spec is None:
            continue
        try:
            quantized = round_to_nearest(weight, spec.resolve(name, linear.in_features))
        except InputError as error:
            raise CheckpointError(f"{folder.path}: {name}.weight cannot be quantized: {error}") from error
        table.setdefault(width, {})[name] = relative_error(weight, quantized) ** 2


def _read(path: Path, folder: ModelFolder, options: Options) -> dict[int, dict[str, float]]:
    value = read_json_object(path)
    if value.get("format") != FORMAT or value.get("version") != 1:
        raise InputError(f"{path}: is no error table of version 1; give another --errors file or remove this one.")
    for key, own in _key(folder, options).items():
        if value.get(key) != own:
            raise InputError(
                f"{path}: was made for {key} {value.get(key)!r}, not {own!r}; give another --errors file or remove it."
            )
    _logger.info("rounding errors: from %s", path)
    return parse_errors(value.get("errors"), f"{path}: 'errors'")


def _key(folder: ModelFolder, options: Options) -> dict[str, object]:
    return {"fingerprint": fingerprint(folder), "group_size": options.group_size, "symmetric": options.symmetric}


def _text(folder: ModelFolder, options: Options, table: ErrorTable) -> str:
    errors = {str(width): dict(row) for width, row in sorted(table.items())}
    value = {"format": FORMAT, "version": 1, **_key(folder, options), "errors": errors}
    return json.dumps(value, indent=1) + "\n"
