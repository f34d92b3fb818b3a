"""``qtale quantize MODEL -o OUT``: write a quantized copy of a model."""

from __future__ import annotations

import argparse
import json
import os
import sys

from qtale.errors import InputError
from qtale.ptq.options import METHODS, RTN, SolverOptions
from qtale.ptq.products import COMPUTE_DTYPES

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
    _add_method(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, from headers only")
    parser.add_argument("--all", action="store_true", help="a line for every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default=RTN, help="how codes are found (default %(default)s)")
    group = parser.add_argument_group("calibrated methods")
    group.add_argument(
        "--calibration",
        default="bundled",
        metavar="FILE|bundled|hub",
        help="a UTF-8 text, the demo tasks' passages, or WikiText-2's training split (default %(default)s)",
    )
    group.add_argument("--num-samples", type=int, metavar="N", help="calibration sequences (default 128)")
    group.add_argument("--seq-len", type=int, metavar="N", help="tokens in each (default 512)")
    group.add_argument("--seed", type=int, metavar="N", help="what they are drawn with (default 0)")
    group.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="round the columns of the largest inputs first (default: as the method has it)",
    )
    group.add_argument("--damp", type=float, metavar="F", help="share of the Hessian's mean diagonal (default 0.01)")
    group.add_argument("--tune-steps", type=int, metavar="N", help="steps of end-to-end tuning (auto: 64, others: 0)")
    group.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        help="of the layers' products over calibration tokens (default auto: bfloat16 where the CPU multiplies it)",
    )
    group.add_argument("--resume", metavar="DIR", help="keep all state there; a killed run goes on where it was")
    group.add_argument("--max-memory", metavar="SIZE", help="hidden states in memory before files (default 256MiB)")


def _options(args: argparse.Namespace) -> SolverOptions:
    names = ("num_samples", "seq_len", "seed", "act_order", "damp", "tune_steps", "compute_dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.method == RTN and (given or args.resume is not None):
        raise InputError(
            "quantize: rounding to nearest looks at no data; leave calibration options out, or give --method auto."
        )
    return SolverOptions(args.method, **given)


def run(args: argparse.Namespace) -> int:
    """Quantize and print the report; returns 0."""
    from qtale.integrations.quantize import quantize
    from qtale.integrations.scoring_model import model_folder, spec_of
    from qtale.layerwise.states import MAX_MEMORY
    from qtale.memory import parse_size
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
        model_folder(args.model),
        args.output,
        spec,
        method=_options(args),
        calibration=args.calibration,
        plan=args.plan,
        resume=args.resume,
        max_memory=MAX_MEMORY if args.max_memory is None else parse_size(args.max_memory, "--max-memory"),
        dry_run=args.dry_run,
        progress=progress,
    )
    print(json.dumps(report.to_json()) if args.json else render(report, args.all))
    return 0
