"""What a measurement ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from qtale import _core


def machine() -> dict[str, Any]:
    """Processor, instruction sets, system and versions."""
    import numpy as np

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cpus": _core.num_threads(),
        "isa": _core.cpu_isa(),
        "isas": _core.cpu_isas(),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "qtale": _core.build_info(),
    }


def machine_lines(about: dict[str, Any]) -> list[str]:
    """The same in two lines for people."""
    return [
        f"{about['cpu']} (family {about['family']}, model {about['model']}), {about['cpus']} CPUs, {about['system']}",
        f"kernels: {about['isa']} of {', '.join(about['isas'])}; qtale {about['qtale']['version']}, "
        f"{about['qtale']['compiler']}; numpy {about['numpy']}, Python {about['python']}",
    ]
