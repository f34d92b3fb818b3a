"""``qtale quantize MODEL -o OUT``: write a quantized copy of a model."""

from __future__ import annotations

import argparse
import json
import os
import sys

from qtale.errors import InputError

NAME = "quantize"
HELP = "write a quantized copy of a model as an ordinary HuggingFace folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a hub name, or 'demo'")
    parser.add_argument("-o", "--output", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--plan", metavar="PLAN", help="plan.json of `qtale plan`, instead of --bits and groups")
    parser.add_argument("--bits", type=int, metavar="N", help="2, 3, 4 or 8 (default 4)")
    parser.add_argument("--group-size", metavar="auto|N|channel", help="weights per scale: 32, 64, 128 (default auto)")
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--symmetric", dest="symmetric", action="store_true", default=None, help="the default")
    symmetry.add_argument(
        "--asymmetric",
        dest="symmetric",
        action="store_false",
        default=None,
        help="zero points; not every loader reads them",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, from headers only")
    parser.add_argument("--all", action="store_true", help="a line for every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantize and print the report; returns 0."""
    from qtale.integrations.scoring_model import model_folder, spec_of
    from qtale.ptq.pipeline import quantize
    from qtale.report.quantize import render

    given = [args.bits, args.group_size, args.symmetric]
    if args.plan is not None and any(value is not None for value in given):
        raise InputError("quantize: --plan says bits, groups and symmetry; leave out --bits and the others.")
    spec = None
    if args.plan is None:
        bits, group_size = 4 if args.bits is None else args.bits, args.group_size
        spec = spec_of(bits, "auto" if group_size is None else group_size, args.symmetric is not False)
    if args.output is None and not args.dry_run:
        raise InputError("quantize: no output folder is given; add -o OUT, or --dry-run to see what would be done.")
    progress = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    report = quantize(
        model_folder(args.model), args.output, spec, plan=args.plan, dry_run=args.dry_run, progress=progress
    )
    print(json.dumps(report.to_json()) if args.json else render(report, args.all))
    return 0
