"""How much memory a model may take, seen from the process that holds it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qtale.memory.devices import BUDGET_VARIABLE, Budget, Device, budget, devices, most_free
from qtale.memory.sizes import human_bytes

# Share of the free memory that is left alone: other processes move, and reading a tensor needs room beside the plan.
HEADROOM = 0.05
_FIXED = ("given", BUDGET_VARIABLE)
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
    return found if found.source in _FIXED else _with_held(found, held)


def room_to_follow(asked: int | str, held: int, probe: Probe = cpu_devices) -> Budget:
    """As :func:`room`, but never more than what is free but for 5 %, and what is held; raises as it does."""
    found = budget(asked, probe)
    if found.source not in _FIXED:
        return _with_held(found, held)
    free = most_free(probe()).free_bytes
    return min(found, _with_held(Budget(free, f"{human_bytes(free)} free"), held), key=lambda it: it.num_bytes)


def _with_held(free: Budget, held: int) -> Budget:
    kept = f", {human_bytes(held)} held by the model" if held else ""
    return Budget(int(free.num_bytes * (1 - HEADROOM)) + held, f"{free.source}{kept}")
