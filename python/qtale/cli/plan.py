"""``qtale plan importance.json --budget 6GiB -o plan.json``: choose bits for every layer."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qtale.errors import InputError

if TYPE_CHECKING:
    from qtale.planner import Options, Plan

NAME = "plan"
HELP = "choose bits for every layer under a memory budget or at an average"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="importance.json, a model folder, a hub name, 'demo' or config.json"
    )
    parser.add_argument("--show", metavar="PLAN", help="print a plan that was made before, and make none")
    parser.add_argument("-o", "--output", metavar="PLAN", help="file to write; must not exist")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--budget", metavar="auto|SIZE", help="6GiB, 900 MB …; default auto: all memory that is free")
    target.add_argument("--bits", type=float, metavar="AVERAGE", help="bits per weight in place of a budget")
    parser.add_argument(
        "--mode",
        "--solver",
        choices=("paper", "greedy", "knapsack", "uniform"),
        default="knapsack",
        help="paper: LSAQ's 16, 8 and 4 bits by layer; knapsack: least expected loss (default)",
    )
    parser.add_argument(
        "--metric",
        default="auto",
        help="scores to plan by; best: run the plans of several and compare (default auto)",
    )
    parser.add_argument("--choices", type=_bits, metavar="16,8,4,…", help="bits to choose from (default 16,8,4,3)")
    parser.add_argument("--granularity", choices=("layer", "module"), help="what gets bits of its own")
    parser.add_argument("--head-bits", default="16", metavar="auto|N", help="bits of an untied lm_head (default 16)")
    parser.add_argument("--group-size", metavar="auto|N|channel", help="weights per scale; mode paper: channel")
    parser.add_argument("--asymmetric", action="store_true", help="zero points; not every loader reads them")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens to hold in the KV cache")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time")
    parser.add_argument("--reserve", metavar="SIZE", help="keep this beside the weights, not KV cache and workspace")
    parser.add_argument("--errors", metavar="FILE", help="keep the table of rounding errors here between runs")
    parser.add_argument("--model", metavar="MODEL", help="where the model of importance.json lies now")
    parser.add_argument("--wait", action="store_true", help="wait until enough memory is free")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="wait no longer than this")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Make or show a plan; returns 0."""
    from qtale.planner import Plan
    from qtale.report.plan import render

    if args.show is not None:
        if args.source is not None or args.output is not None:
            raise InputError("plan: --show prints a plan that is there; leave out SOURCE and -o.")
        made = Plan.read(args.show)
    else:
        made = _make(args)
    print(json.dumps(made.to_json()) if args.json else render(made))
    return 0


def _make(args: argparse.Namespace) -> Plan:
    from qtale.integrations.scoring_model import DEMO, model_folder
    from qtale.planner import plan

    if args.source is None:
        raise InputError("plan: give importance.json or a model to plan for, or --show with a plan to look at.")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None and output.exists():
        raise InputError(f"{output}: exists already; give another file or remove it first.")
    if args.timeout is not None and not args.wait:
        raise InputError("plan: --timeout limits --wait; give both or none.")
    made = plan(
        model_folder(DEMO) if args.source == DEMO else args.source,
        args.budget,
        bits=args.bits,
        options=_options(args),
        model=model_folder(DEMO) if args.model == DEMO else args.model,
        errors=args.errors,
        wait=args.wait,
        timeout=args.timeout,
        progress=sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"),
    )
    if output is not None:
        made.write(output)
        logging.getLogger("qtale").info("wrote %s", output)
    return made


def _options(args: argparse.Namespace) -> Options:
    from qtale.memory import parse_size
    from qtale.planner import Options

    groups, head = args.group_size, args.head_bits
    return Options(
        mode=args.mode,
        metric=args.metric,
        choices=args.choices,
        granularity=args.granularity,
        head_bits=int(head) if head.isdecimal() else head,
        group_size=int(groups) if groups and groups.isdecimal() else groups,
        symmetric=not args.asymmetric,
        context=args.context,
        batch=args.batch,
        reserve=None if args.reserve is None else parse_size(args.reserve, "--reserve"),
    )


def _bits(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of bits such as 16,8,4")
    return tuple(int(part) for part in parts)
