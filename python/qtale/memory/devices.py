"""Where a model could live, and how much room there is: the CPU and every CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale.errors import Error, InputError
from qtale.memory import host, nvml
from qtale.memory.sizes import human_bytes, parse_size

BUDGET_VARIABLE = "QTALE_MEMORY_BUDGET"
AUTO = "auto"


@dataclass(frozen=True)
class Device:
    """A place for a model: ``name`` is ``cpu``, ``cuda:0`` …; ``free_bytes`` is what this process may still take."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Budget:
    """Bytes that a model may take, and in ``source`` where the number comes from."""

    num_bytes: int
    source: str


def devices() -> tuple[Device, ...]:
    """The CPU and every CUDA device that ``CUDA_VISIBLE_DEVICES`` leaves.

    CUDA devices are asked through torch where it is loaded already, else through the driver. Raises Error where the
    kernel does not say how much memory is free.
    """
    return (_cpu(), *(_cuda_by_torch(sys.modules["torch"]) if "torch" in sys.modules else _cuda_by_driver()))


def usable_devices() -> tuple[Device, ...]:
    """Those of :func:`devices` that this build computes on: the CPU, and CUDA devices where its kernels are built."""
    from qtale import _core

    cuda = bool(_core.build_info()["cuda"])
    return tuple(device for device in devices() if cuda or device.name == "cpu")


def most_free(found: Sequence[Device]) -> Device:
    """The device with the most free memory, the first of equals."""
    return max(found, key=lambda device: device.free_bytes)


def budget(asked: int | str = AUTO, probe: Callable[[], Sequence[Device]] = usable_devices) -> Budget:
    """What a model may take: a number of bytes, a size such as ``6GiB``, or ``auto``.

    ``auto`` is ``QTALE_MEMORY_BUDGET`` where it is set, else all that is free on the device of ``probe`` with the most
    free memory. Raises InputError for anything that is no size, naming the variable where it comes from there.
    """
    if isinstance(asked, int):
        if isinstance(asked, bool) or asked < 0:
            raise InputError(f"budget {asked!r} is no size; give bytes, a size such as '6GiB', or 'auto'.")
        return Budget(asked, "given")
    if asked != AUTO:
        return Budget(parse_size(asked, "budget"), "given")
    override = os.environ.get(BUDGET_VARIABLE)
    if override:
        return Budget(parse_size(override, BUDGET_VARIABLE), BUDGET_VARIABLE)
    device = most_free(probe())
    return Budget(device.free_bytes, f"{human_bytes(device.free_bytes)} free on {device.name}")


def _cpu(root: Path = host.ROOT) -> Device:
    free = host.available(root)
    if free is None:
        raise Error(
            "memory: neither /proc/meminfo nor a control group says how much is free; give a budget such as 6GiB."
        )
    total = host.meminfo(root).get("MemTotal", free)
    limit = host.group_limit(root)
    return Device("cpu", "main memory", total if limit is None else min(total, limit), free)


def _cuda_by_torch(torch: Any) -> list[Device]:
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available():
        return []
    found = []
    for index in range(cuda.device_count()):
        free, total = cuda.mem_get_info(index)
        found.append(Device(f"cuda:{index}", cuda.get_device_name(index), total, free))
    return found


def _cuda_by_driver() -> list[Device]:
    gpus = nvml.visible(nvml.all_gpus())
    return [Device(f"cuda:{index}", gpu.name, gpu.total, gpu.free) for index, gpu in enumerate(gpus)]
