"""``qtale doctor``: versions, instruction sets, threads, memory and CUDA as qtale finds them."""

from __future__ import annotations

import argparse

NAME = "doctor"
HELP = "show versions, instruction sets, threads, memory and CUDA as qtale finds them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 1 where it names problems."""
    from qtale.doctor import report, show

    return show(report(), args.json)
