"""Memory of NVIDIA devices through the driver's own library (NVML), without torch and without a CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """One device of the machine: bytes in all and free, in the driver's (PCI bus) order."""

    uuid: str
    name: str
    total: int
    free: int


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def all_gpus() -> list[Gpu]:
    """Every device that the driver reports; empty where there is no driver or it does not answer."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return []
    if library.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        return [gpu for gpu in (_gpu(library, index) for index in range(count.value)) if gpu is not None]
    finally:
        library.nvmlShutdown()


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The devices that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; as CUDA does, a wrong entry ends the list.

    Numbers count in the driver's order, which is CUDA's under ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` and wherever all devices
    are of one kind.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdecimal():
            found = [gpus[int(entry)]] if int(entry) < len(gpus) else []
        else:
            found = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def _gpu(library: ctypes.CDLL, index: int) -> Gpu | None:
    device, memory = ctypes.c_void_p(), _Memory()
    uuid, name = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_NAME_BYTES)
    answers = (
        library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)),
        library.nvmlDeviceGetUUID(device, uuid, _NAME_BYTES),
        library.nvmlDeviceGetName(device, name, _NAME_BYTES),
        library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)),
    )
    if any(answers):
        return None
    return Gpu(uuid.value.decode(), name.value.decode(), int(memory.total), int(memory.free))
