"""Seconds and peak memory of a step that runs in a process of its own; needs only Python, so peers use it too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The most memory that this process had resident, 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def main(prepare: Callable[[dict[str, Any]], Callable[[], object]]) -> int:
    """Run what ``prepare`` makes of the JSON object in argv[1]; its figures go to the file that ``result`` names.

    Imports belong in ``prepare``, which is not timed; memory counts all that the process ever had.
    """
    asked = json.loads(sys.argv[1])
    step = prepare(asked)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    Path(asked["result"]).write_text(json.dumps({**found, "peak_bytes": peak_bytes()}), encoding="utf-8")
    return 0
