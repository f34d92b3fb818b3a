"""Where a benchmark's figures and errors go: a table for people, JSON for programs, a sentence and a status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qtale import Error
from qtale.files import write_whole


def publish(result: dict[str, Any], text: str, target: str | None) -> None:
    """Print ``text``, and ``result`` as JSON to the file ``target``, or to stdout for "-"; the text then to stderr."""
    print(text, file=sys.stderr if target == "-" else sys.stdout)
    if target == "-":
        print(json.dumps(result, indent=1))
    elif target:
        write_whole(Path(target), json.dumps(result, indent=1) + "\n")


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark's ``main`` and leave with its status; with 1 after an error of qtale, which is printed."""
    try:
        sys.exit(main())
    except Error as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(1)
