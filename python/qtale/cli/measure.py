"""``qtale measure MODEL -o importance.json``: score the layers of a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from qtale.importance.options import DEFAULT_METRICS, METRICS, MeasureOptions

NAME = "measure"
HELP = "score how much every layer of a model matters"
_DEFAULT = MeasureOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a dense model folder, a hub name, or 'demo'")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="importance.json to write, a new file")
    parser.add_argument(
        "--metrics",
        default=",".join(DEFAULT_METRICS),
        metavar="A,B",
        help=f"of {', '.join(METRICS)}, or 'all' (default %(default)s)",
    )
    _add_data_arguments(parser)
    _add_metric_arguments(parser)
    parser.add_argument("--resume", metavar="DIR", help="keep all state in DIR, and go on from what it holds")
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="hidden states above it go to a file (default 256MiB)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, without the token sets")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("calibration").add_argument
    add(
        "--calibration",
        default="bundled",
        metavar="bundled|hub|FILE",
        help="BoolQ's Wikipedia passages (default), WikiText-2's training text, or a text file",
    )
    add("--num-sequences", type=int, default=_DEFAULT.num_sequences, metavar="N", help="default %(default)s")
    add("--seq-len", type=int, default=_DEFAULT.seq_len, metavar="N", help="tokens of each (default %(default)s)")
    add("--seed", type=int, default=_DEFAULT.seed, metavar="N", help="draws the sequences (default %(default)s)")


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("metrics").add_argument
    add("--top-k", type=int, default=_DEFAULT.top_k, metavar="K", help="jaccard: tokens of a set (default %(default)s)")
    add("--matrix", default=_DEFAULT.matrix, metavar="embed|lm_head", help="jaccard: default %(default)s")
    add("--norm", default=_DEFAULT.norm, metavar="none|final", help="jaccard: before the matrix (default %(default)s)")
    add(
        "--positions",
        default=_DEFAULT.positions,
        metavar="last|all",
        help="jaccard, lim: tokens (default %(default)s)",
    )
    add("--zd-tail", default=_DEFAULT.zd_tail, metavar="upper|both", help="zd: z > 1 (default) or |z| > 1")
    add(
        "--zd-order",
        default=_DEFAULT.zd_order,
        metavar="paper|reversed",
        help="zd: a smaller share is more important (default), or a larger one",
    )
    add(
        "--error-bits",
        type=int,
        default=_DEFAULT.error_bits,
        metavar="N",
        help="error, fisher, kl: default %(default)s",
    )
    add("--group-size", default=_DEFAULT.group_size, metavar="auto|N|channel", help="error, fisher, kl: default auto")
    add("--loss-sequences", type=int, default=_DEFAULT.loss_sequences, metavar="N", help="fisher, noise, kl: default 8")
    add("--noise", type=float, default=_DEFAULT.noise, metavar="T", help="noise: relative size (default %(default)s)")


def options_of(args: argparse.Namespace) -> MeasureOptions:
    """The settings that the arguments ask for; raises InputError for values that are not accepted."""
    names = [field.name for field in dataclasses.fields(MeasureOptions) if field.name not in ("metrics", "group_size")]
    metrics = METRICS if args.metrics == "all" else tuple(name.strip() for name in args.metrics.split(","))
    group = int(args.group_size) if args.group_size.isdecimal() else args.group_size
    return MeasureOptions(metrics=metrics, group_size=group, **{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> int:
    """Measure, write the file and print the scores; returns 0."""
    from qtale.integrations.measure import measure
    from qtale.integrations.scoring_model import model_folder
    from qtale.layerwise.states import MAX_MEMORY
    from qtale.memory import parse_size
    from qtale.report.importance import render

    options = options_of(args)
    progress = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    importance = measure(
        model_folder(args.model),
        options,
        calibration=args.calibration,
        out=Path(args.output),
        resume=args.resume,
        max_memory=MAX_MEMORY if args.max_memory is None else parse_size(args.max_memory, "--max-memory"),
        progress=progress,
    )
    if args.json:
        kept = {key: part for key, part in importance.to_json().items() if key not in ("token_sets", "words", "tokens")}
        print(json.dumps({"out": args.output, **kept}))
    else:
        print(render(importance))
    return 0
