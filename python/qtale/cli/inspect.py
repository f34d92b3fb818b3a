"""``qtale inspect PATH``: what is in a model folder."""

from __future__ import annotations

import argparse
import json

NAME = "inspect"
HELP = "show what a model folder holds: layers, bits, groups, sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("path", metavar="PATH", help="a model folder, dense or quantized, a hub name, or 'demo'")
    parser.add_argument("--all", action="store_true", help="a line for every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0."""
    from qtale.integrations.scoring_model import model_folder
    from qtale.report.inspect import inspect

    report = inspect(model_folder(args.path))
    print(json.dumps(report.to_json()) if args.json else report.text(args.all))
    return 0
