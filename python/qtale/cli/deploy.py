"""``qtale deploy MODEL --budget auto``: run a model in the memory at hand, and follow it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import TYPE_CHECKING

from qtale.errors import InputError
from qtale.spec import COMPUTE

if TYPE_CHECKING:
    from qtale.deployment import Deployment, DeployReport
    from qtale.planner import Options

NAME = "deploy"
HELP = "quantize a model in memory so that it fits, and follow the free memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a dense model folder, a hub name, or 'demo'")
    parser.add_argument("--budget", default="auto", metavar="auto|SIZE", help="6GiB, 900 MB …; default auto")
    parser.add_argument("--importance", metavar="FILE", help="importance.json of `qtale measure`, to choose layers by")
    parser.add_argument("--plan", metavar="FILE", help="plan.json to begin with, in place of one made here")
    parser.add_argument(
        "--mode",
        "--solver",
        choices=("paper", "greedy", "knapsack", "uniform"),
        help="how bits are chosen; default knapsack: least expected loss",
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens to hold in the KV cache (default 2048)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at a time (default 1)")
    parser.add_argument("--errors", metavar="FILE", help="keep the table of rounding errors here between runs")
    parser.add_argument("--compute", choices=COMPUTE, default="int8", help="how quantized layers multiply")
    parser.add_argument(
        "--backend", choices=("auto", "engine", "torch"), default="auto", help="what runs it; default auto: the engine"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the engine; default as many as cores")
    parser.add_argument("--kv-rule", "--kv_rule", metavar="evict|keep", help="what skipped tokens leave in a layer")
    parser.add_argument("--watch", action="store_true", help="follow the free memory until Ctrl-C")
    parser.add_argument("--interval", type=float, metavar="SECONDS", help="time between looks of --watch (default 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object; with --watch, one for each change")


def run(args: argparse.Namespace) -> int:
    """Deploy, print the report, and watch where asked to; returns 0, also when Ctrl-C ends the watch."""
    from qtale.deployment import deploy
    from qtale.integrations.scoring_model import model_folder

    if args.interval is not None and not args.watch:
        raise InputError("deploy: --interval paces --watch; give both or none.")
    if args.watch and args.interval is not None and not args.interval > 0:
        raise InputError(f"deploy: --interval {args.interval:g}; it must be more than 0 seconds.")
    deployment = deploy(
        model_folder(args.model),
        args.budget,
        plan=args.plan,
        importance=args.importance,
        options=_options(args),
        errors=args.errors,
        compute=args.compute,
        backend=args.backend,
        num_threads=args.threads,
        kv_rule=args.kv_rule,
        progress=sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"),
    )
    _print(deployment.report, args.json)
    if args.watch:
        _watch(deployment, args)
    return 0


def _watch(deployment: Deployment, args: argparse.Namespace) -> None:
    from qtale.deployment import watch
    from qtale.deployment.watch import POLL_SECONDS

    logger = logging.getLogger("qtale")
    interval = POLL_SECONDS if args.interval is None else args.interval
    try:
        logger.info("watching the free memory every %g s; Ctrl-C ends it", interval)
        watch(deployment, interval=interval, changed=lambda report: _print(report, args.json))
    except KeyboardInterrupt:
        logger.info("stopped watching")


def _options(args: argparse.Namespace) -> Options | None:
    from qtale.planner import Options

    given = {key: getattr(args, key) for key in ("mode", "context", "batch") if getattr(args, key) is not None}
    if args.plan is not None and "mode" in given:
        raise InputError("deploy: --plan says how bits are chosen; leave out --mode.")
    return Options(**given) if given else None


def _print(report: DeployReport, as_json: bool) -> None:
    from qtale.report.deploy import render

    print(json.dumps(report.to_json()) if as_json else render(report), flush=True)
