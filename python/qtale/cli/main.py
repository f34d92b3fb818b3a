"""Entry point of ``qtale VERB``: parses, runs the verb's module, turns qtale errors into one sentence on stderr."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from qtale.errors import Error

VERBS = (
    *("measure", "plan", "quantize", "deploy", "generate", "chat", "bench"),
    *("eval", "report", "inspect", "import_gguf", "doctor"),
)


class Verb(Protocol):
    """What each module of ``qtale.cli`` offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def _load_verb(module: str) -> Verb:
    return cast(Verb, importlib.import_module(f"qtale.cli.{module}"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; verbs import heavy packages only when they run."""
    parser = argparse.ArgumentParser(prog="qtale", description="Quantize, run, inspect and score language models.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for module in VERBS:
        verb = _load_verb(module)
        sub = verbs.add_parser(verb.NAME, help=verb.HELP, description=verb.HELP)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def configure_logging() -> None:
    """Log lines to stderr; ``QTALE_LOG_LEVEL`` sets the level (default INFO)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("qtale: %(message)s"))
    logger = logging.getLogger("qtale")
    logger.handlers = [handler]
    logger.setLevel(os.environ.get("QTALE_LOG_LEVEL", "INFO").upper())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 a qtale error, 2 wrong usage)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from qtale import __version__

        print(__version__)
        return 0
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    configure_logging()
    if "torch" not in sys.modules:  # threads of torch that spin between its operators would take the cores of ours
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return int(args.run(args))
    except Error as error:
        print(f"qtale: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qtale: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
