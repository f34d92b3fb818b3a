"""Where a benchmark's figures go: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qtale.files import write_whole


def publish(result: dict[str, Any], text: str, target: str | None) -> None:
    """Print ``text``, and ``result`` as JSON to the file ``target``, or to stdout for "-"; the text then to stderr."""
    print(text, file=sys.stderr if target == "-" else sys.stdout)
    if target == "-":
        print(json.dumps(result, indent=1))
    elif target:
        write_whole(Path(target), json.dumps(result, indent=1) + "\n")
