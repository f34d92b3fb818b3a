"""How much memory a model may take, seen from the process that holds it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qtale.memory.devices import BUDGET_VARIABLE, Budget, Device, budget, devices
from qtale.memory.sizes import human_bytes

# Share of the free memory that is left alone: other processes move, and reading a tensor needs room beside the plan.
HEADROOM = 0.05
Probe = Callable[[], Sequence[Device]]


def cpu_devices() -> tuple[Device, ...]:
    """Main memory alone: deployed models compute on the CPU."""
    return tuple(device for device in devices() if device.name == "cpu")


def room(asked: int | str, held: int, probe: Probe = cpu_devices) -> Budget:
    """The bytes for a model of which ``held`` are taken already.

    Sizes that are given, here or by ``QTALE_MEMORY_BUDGET``, count as they are; ``auto`` is what is free but for 5 %,
    and what is held. Raises InputError for anything that is no size.
    """
    found = budget(asked, probe)
    if found.source in ("given", BUDGET_VARIABLE):
        return found
    kept = f", {human_bytes(held)} held by the model" if held else ""
    return Budget(int(found.num_bytes * (1 - HEADROOM)) + held, f"{found.source}{kept}")
