"""The rows of benchmarks/ptq.py as Markdown tables, one for each form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_HEAD = ("method", "perplexity", "gap closed", "seconds", "CPU seconds", "peak MiB", "MB on disk")


def render(result: Mapping[str, Any]) -> str:
    """All forms, seeds joined, and what they ran on."""
    rows: Sequence[Row] = result["rows"]
    dense = next((row["perplexity"] for row in rows if not row["form"]), None)
    about = result["machine"]
    lines = [f"{about['cpu']}, {result['settings']['threads']} threads, kernels: {about['isa']}"]
    if dense is not None:
        lines.append(f"dense: {dense:.3f}")
    for form in dict.fromkeys(row["form"] for row in rows if row["form"]):
        chosen = [row for row in rows if row["form"] == form]
        lines += ["", f"{form}:", "", f"| {' | '.join(_HEAD)} |", f"|---|{'---:|' * (len(_HEAD) - 1)}"]
        groups: dict[str, list[Row]] = {}
        for row in chosen:
            groups.setdefault(f"{row['peer']} {row['method']}".strip(), []).append(row)
        nearest = next((row["perplexity"] for row in chosen if not row["peer"] and row["method"] == "rtn"), None)
        lines += [f"| {' | '.join(_cells(name, group, nearest, dense))} |" for name, group in groups.items()]
    if result["unfinished"]:
        lines += ["", f"{result['unfinished']} rows are left; run it again to go on"]
    return "\n".join(lines)


def closed(perplexity: float, nearest: float, dense: float) -> float:
    """The share of the gap in log-perplexity between rounding to nearest and dense that is gone."""
    return math.log(nearest / perplexity) / math.log(nearest / dense)


def _cells(name: str, rows: Sequence[Row], nearest: float | None, dense: float | None) -> list[str]:
    values = [row["perplexity"] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    known = nearest is not None and dense is not None and nearest != dense and name != "rtn"
    share = f"{closed(statistics.geometric_mean(values), nearest or 1, dense or 1):.0%}" if known else ""
    mean = {
        key: statistics.fmean(row[key] for row in rows) for key in ("seconds", "cpu_seconds", "peak_bytes", "bytes")
    }
    figures = [f"{mean['seconds']:.0f}", f"{mean['cpu_seconds']:.0f}"]
    sizes = [f"{mean['peak_bytes'] / 2**20:.0f}", f"{mean['bytes'] / 1e6:.1f}"]
    return [name, f"{statistics.fmean(values):.2f}{spread}", share, *figures, *sizes]
