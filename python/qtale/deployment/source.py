"""What a deployment begins with: a folder, scores of its layers, and what is to run it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from qtale.checkpoint.folder import open_folder
from qtale.errors import InputError, UnsupportedError
from qtale.importance.file import Importance
from qtale.memory.devices import AUTO
from qtale.memory.runtime import ENGINE, TORCH
from qtale.planner.source import Source, open_source

_logger = logging.getLogger("qtale")
BACKENDS = (AUTO, ENGINE, TORCH)


def check_backend(asked: str) -> None:
    """Raise InputError for anything that is no backend."""
    if asked not in BACKENDS:
        raise InputError(f"deploy: backend {asked!r} is not known; use {', '.join(map(repr, BACKENDS))}.")


def chosen_backend(asked: str, source: Source) -> str:
    """The engine for "auto" where it runs the model, else PyTorch; UnsupportedError where it is wanted and cannot."""
    from qtale.deployment.engine_model import unsupported

    if asked == TORCH or source.folder is None:
        return TORCH
    reason = unsupported(source.folder)
    if reason is None:
        return ENGINE
    if asked == ENGINE:
        raise UnsupportedError(f"deploy: the engine does not run this model; use backend 'auto' or 'torch'. {reason}")
    _logger.info("deploy: PyTorch runs this model. %s", reason)
    return TORCH


def check_engine_options(backend: str, **options: object) -> None:
    """Raise InputError where PyTorch runs the model and an option of the engine is given (not None)."""
    given = [name for name, value in options.items() if value is not None]
    if backend == TORCH and given:
        raise InputError(
            f"deploy: {', '.join(given)}: for the engine only, but PyTorch runs this model; leave them out."
        )


def find_source(model: str | Path, importance: Importance | str | Path | None) -> Source:
    """What to plan from: a folder or hub name, and scores of its layers; InputError for scores of another model."""
    open_folder(model)
    if importance is None or isinstance(importance, Importance):
        source = dataclasses.replace(open_source(model), importance=importance)
        if importance is not None:
            importance.check_model(source.model.fingerprint)
        return source
    source = open_source(importance, model)
    if source.importance is None:
        raise InputError(f"deploy: {importance} is no importance.json; make one with `qtale measure`.")
    return source
