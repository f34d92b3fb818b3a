"""What qtale shows: folders and runs as text tables and JSON, measurements, plans and errors as charts and one page.

qtale.report.write_page("report.html", importance, plan, results)        # results: of benchmarks/lsaq.py
qtale.report.charts.importance_bars(importance).savefig("importance.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtale.report import charts
    from qtale.report.page import write_charts, write_page
    from qtale.report.quantization import Quantization
    from qtale.report.results import Results

_LAZY = {
    "Quantization": "qtale.report.quantization",
    "Results": "qtale.report.results",
    "write_charts": "qtale.report.page",
    "write_page": "qtale.report.page",
}

__all__ = ["Quantization", "Results", "charts", "write_charts", "write_page"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "charts":
        return importlib.import_module("qtale.report.charts")
    raise AttributeError(f"module 'qtale.report' has no attribute {name!r}")
