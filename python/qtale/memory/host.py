"""Memory of this machine as the kernel reports it: /proc/meminfo and control groups of version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# cgroup v1 writes a number near 2^63 for "no limit".
_NO_LIMIT = 1 << 60


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """The fields of /proc/meminfo in bytes; empty where there is none."""
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) << 10 for fields in lines if len(fields) == 3 and fields[1].isdigit()}


def group_limit(root: Path = ROOT) -> int | None:
    """The smallest memory limit in bytes among the control groups that this process is in; None without a limit."""
    return min((limit for limit, _ in _groups(root)), default=None)


def available(root: Path = ROOT) -> int | None:
    """Bytes that this process may still take: the least of MemAvailable and what its control groups leave.

    File pages that a group can drop at once (``inactive_file``) count as free. None where the kernel says neither.
    """
    left = [max(0, limit - used) for limit, used in _groups(root)]
    free = meminfo(root).get("MemAvailable")
    return min((*left, *([] if free is None else [free])), default=None)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of every control group above this process that has a limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _chain(root, ("sys/fs/cgroup", "sys/fs/cgroup/unified"), path, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _chain(root, ("sys/fs/cgroup/memory",), path, _VERSION_1)


def _chain(root: Path, mounts: tuple[str, ...], path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    own = Path(path.strip("/"))
    limit_name, usage_name, reclaimable = names
    for mount in mounts:
        # Inside a container the path may be the host's and not exist here; the mount itself is then the own group.
        for folder in dict.fromkeys((root / mount / own, *(root / mount / parent for parent in own.parents))):
            limit = _number(folder / limit_name)
            if limit is not None and limit < _NO_LIMIT:
                used = (_number(folder / usage_name) or 0) - _stat(folder / "memory.stat", reclaimable)
                yield limit, max(0, used)


_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _stat(path: Path, key: str) -> int:
    fields = (line.split() for line in _read(path).splitlines())
    return next((int(pair[1]) for pair in fields if len(pair) == 2 and pair[0] == key and pair[1].isdigit()), 0)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
