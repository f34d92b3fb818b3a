"""What a measurement ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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


def huge_share(array: npt.NDArray[np.uint8]) -> float | None:
    """Part of the array's mapping that lies in huge pages, by /proc/self/smaps; None where there is no such file."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    address, inside, sizes = array.ctypes.data, False, {"Rss": 0, "AnonHugePages": 0}
    for line in smaps.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) < address + array.nbytes and int(span[2], 16) > address
        elif inside and line.partition(":")[0] in sizes:
            sizes[line.partition(":")[0]] += int(line.split()[1])
    return sizes["AnonHugePages"] / sizes["Rss"] if sizes["Rss"] else None
