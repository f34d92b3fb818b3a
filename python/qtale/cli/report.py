"""``qtale report importance.json [plan.json] [quantize.json] [results.json] -o report.html``: charts on one page."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.errors import InputError

if TYPE_CHECKING:
    from qtale.importance import Importance
    from qtale.planner import Plan
    from qtale.report import Quantization, Results

    Parts = tuple[Importance | None, Plan | None, Results | None, Quantization | None]

NAME = "report"
HELP = "show importance, a plan, a quantization's errors and results on one HTML page"
_PARTS = {
    "qtale.importance": "importance",
    "qtale.plan": "plan",
    "qtale.results": "results",
    "qtale.quantization": "quantization",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="importance.json, plan.json, the output of `qtale quantize --json`, results.json of benchmarks/lsaq.py; "
        "the first or the third at least",
    )
    parser.add_argument("-o", "--output", metavar="HTML", required=True, help="page to write, a new file")
    parser.add_argument("--png", metavar="DIR", help="also write the charts as PNG files into this new folder")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the page; returns 0."""
    from qtale.importance.file import check_new
    from qtale.report import write_charts, write_page

    parts = read_parts(args.files)
    check_new(Path(args.output).expanduser())
    if args.png is not None:
        write_charts(args.png, *parts)
    write_page(args.output, *parts)
    logging.getLogger("qtale").info("wrote %s", args.output)
    if args.json:
        print(json.dumps({"out": args.output, "png": args.png}))
    return 0


def read_parts(files: list[str]) -> Parts:
    """The parts by what their ``format`` says, in any order; InputError for others and for two of a kind."""
    from qtale.importance import Importance
    from qtale.planner import Plan
    from qtale.report import Quantization, Results

    readers: dict[str, Any] = {"importance": Importance.read, "plan": Plan.read}
    readers.update(results=Results.read, quantization=Quantization.read)
    found: dict[str, Any] = {}
    for file in files:
        part = _part(Path(file).expanduser())
        if part in found:
            raise InputError(f"{file}: is a second {part}; a report shows one of each.")
        found[part] = readers[part](file)
    return found.get("importance"), found.get("plan"), found.get("results"), found.get("quantization")


def _part(path: Path) -> str:
    from qtale.checkpoint.index import read_json_object

    if not path.is_file():
        raise InputError(f"{path}: is no file; give importance.json, plan.json, quantize.json or results.json.")
    kind = str(read_json_object(path).get("format"))
    if kind not in _PARTS:
        raise InputError(f"{path}: has the format {kind!r}; a report is made from {', '.join(_PARTS)}.")
    return _PARTS[kind]
