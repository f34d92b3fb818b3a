"""qtale: make language models fit the hardware at hand and answer faster on it."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from qtale.errors import CheckpointError, Error, InputError, NetworkError, UnsupportedError
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    from qtale import demo, doctor, memory, nn, ops, planner
    from qtale.deployment.deploy import Deployment, deploy
    from qtale.engine.engine import Engine, load
    from qtale.importance.options import MeasureOptions
    from qtale.integrations.measure import measure
    from qtale.integrations.quantize import quantize
    from qtale.integrations.transformers import load_torch
    from qtale.planner.make import plan
    from qtale.ptq.options import SolverOptions
    from qtale.report.inspect import inspect

__version__ = "0.1.0"

# Resolved on first use, so that `import qtale` loads neither torch nor transformers.
_LAZY = {
    "Deployment": "qtale.deployment.deploy",
    "deploy": "qtale.deployment.deploy",
    "Engine": "qtale.engine.engine",
    "load": "qtale.engine.engine",
    "quantize": "qtale.integrations.quantize",
    "SolverOptions": "qtale.ptq.options",
    "load_torch": "qtale.integrations.transformers",
    "measure": "qtale.integrations.measure",
    "MeasureOptions": "qtale.importance.options",
    "inspect": "qtale.report.inspect",
    "plan": "qtale.planner.make",
}
_LAZY_MODULES = ("demo", "doctor", "memory", "nn", "ops", "planner")

__all__ = [
    "CheckpointError",
    "Deployment",
    "Engine",
    "Error",
    "InputError",
    "MeasureOptions",
    "NetworkError",
    "QuantSpec",
    "SolverOptions",
    "UnsupportedError",
    "demo",
    "deploy",
    "doctor",
    "inspect",
    "load",
    "load_torch",
    "measure",
    "memory",
    "nn",
    "ops",
    "plan",
    "planner",
    "quantize",
]

logging.getLogger("qtale").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"qtale.{name}")
    raise AttributeError(f"module 'qtale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
