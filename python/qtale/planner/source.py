"""What a plan is made from: an importance file, a model folder or hub name, or a config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale.checkpoint.folder import CONFIG_FILE, ModelFolder, open_folder
from qtale.checkpoint.identity import config_fingerprint, fingerprint
from qtale.checkpoint.index import INDEX_FILE, SINGLE_FILE, read_json_object
from qtale.errors import CheckpointError, InputError
from qtale.importance.file import FORMAT, Importance
from qtale.memory.shape import ModelShape, shape_of_config, shape_of_folder
from qtale.planner.plan import PlannedModel


@dataclass(frozen=True)
class Source:
    """A model to plan for; ``folder`` is None for a config alone, ``importance`` where nothing was measured."""

    model: PlannedModel
    shape: ModelShape
    folder: ModelFolder | None
    importance: Importance | None


def open_source(source: str | Path, model: str | Path | None = None) -> Source:
    """Open importance.json (with the model that it names, or ``model``), a model folder, a hub name, or a config.json.

    Raises InputError where importance.json is broken or of another model, CheckpointError and UnsupportedError as
    :func:`qtale.checkpoint.open_folder` does.
    """
    path = Path(source).expanduser()
    if path.is_file():
        value = read_json_object(path)
        if value.get("format") == FORMAT:
            return _measured(Importance.from_json(value, str(path)), path, model)
        if "model_type" in value:
            return _of_config(value, str(path))
        raise InputError(f"{path}: is neither importance.json of `qtale measure` nor a model's config.json.")
    has_weights = any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)) or any(path.glob("*.bin"))
    if (path / CONFIG_FILE).is_file() and not has_weights:
        return _of_config(read_json_object(path / CONFIG_FILE), str(path / CONFIG_FILE))
    return _of_folder(open_folder(source))


def _measured(importance: Importance, path: Path, model: str | Path | None) -> Source:
    where = model or importance.model.get("path")
    if not isinstance(where, str | Path):
        raise InputError(f"{path}: does not say where its model lies; give it with --model.")
    try:
        found = _of_folder(open_folder(where), importance)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: its model cannot be opened; give it with --model: {error}") from error
    importance.check_model(found.model.fingerprint)
    return found


def _of_folder(folder: ModelFolder, importance: Importance | None = None) -> Source:
    shape = shape_of_folder(folder)
    return Source(PlannedModel(fingerprint(folder), shape.model_type, shape.num_layers), shape, folder, importance)


def _of_config(config: dict[str, Any], where: str) -> Source:
    shape = shape_of_config(config, where)
    return Source(PlannedModel(config_fingerprint(config), shape.model_type, shape.num_layers), shape, None, None)
