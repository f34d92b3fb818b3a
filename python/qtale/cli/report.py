"""``qtale report importance.json [plan.json] [results.json] -o report.html``: charts and tables on one page."""

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
    from qtale.report import Results

NAME = "report"
HELP = "show importance, a plan and results on one HTML page"
_PARTS = {"qtale.importance": "importance", "qtale.plan": "plan", "qtale.results": "results"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="importance.json, and if there are any plan.json and the results.json of benchmarks/lsaq.py",
    )
    parser.add_argument("-o", "--output", metavar="HTML", required=True, help="page to write, a new file")
    parser.add_argument("--png", metavar="DIR", help="also write the charts as PNG files into this new folder")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the page; returns 0."""
    from qtale.importance.file import check_new
    from qtale.report import write_charts, write_page

    importance, plan, results = read_parts(args.files)
    check_new(Path(args.output).expanduser())
    if args.png is not None:
        write_charts(args.png, importance, plan, results)
    write_page(args.output, importance, plan, results)
    logging.getLogger("qtale").info("wrote %s", args.output)
    if args.json:
        print(json.dumps({"out": args.output, "png": args.png}))
    return 0


def read_parts(files: list[str]) -> tuple[Importance, Plan | None, Results | None]:
    """The parts by what their ``format`` says, in any order; InputError for others, for two of a kind, or for none."""
    from qtale.importance import Importance
    from qtale.planner import Plan
    from qtale.report import Results

    readers: dict[str, Any] = {"importance": Importance.read, "plan": Plan.read, "results": Results.read}
    found: dict[str, Any] = {}
    for file in files:
        part = _part(Path(file).expanduser())
        if part in found:
            raise InputError(f"{file}: is a second {part}; a report shows one of each.")
        found[part] = readers[part](file)
    if "importance" not in found:
        raise InputError("report: no importance.json is given; make one with `qtale measure`.")
    return found["importance"], found.get("plan"), found.get("results")


def _part(path: Path) -> str:
    from qtale.checkpoint.index import read_json_object

    if not path.is_file():
        raise InputError(f"{path}: is no file; give importance.json, plan.json or results.json.")
    kind = str(read_json_object(path).get("format"))
    if kind not in _PARTS:
        raise InputError(f"{path}: has the format {kind!r}; a report is made from {', '.join(_PARTS)}.")
    return _PARTS[kind]
