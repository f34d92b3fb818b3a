"""Which layers matter: scores of every decoder layer, measured layer by layer (LSAQ and what it is compared with)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qtale.importance.options import DEFAULT_METRICS, METRICS, MeasureOptions

if TYPE_CHECKING:
    from qtale.importance.file import Importance
    from qtale.importance.measure import measure_tokens

# Resolved on first use, so that settings can be made without numpy.
_LAZY = {"Importance": "qtale.importance.file", "measure_tokens": "qtale.importance.measure"}

__all__ = ["DEFAULT_METRICS", "METRICS", "Importance", "MeasureOptions", "measure_tokens"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qtale.importance' has no attribute {name!r}")
