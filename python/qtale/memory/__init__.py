"""Memory: what is free on this machine's devices, and what a model needs.

    memory.devices()                                         # the CPU, and CUDA devices that are visible
    memory.budget("auto").num_bytes                          # QTALE_MEMORY_BUDGET, else the most that is free
    shape = memory.shape_of_folder(checkpoint.open_folder("model"))
    memory.needed(shape, plan.spec_of, context=2048, batch=1, backend="engine").total

Needs are those of the engine, or by default of :func:`qtale.load_torch`, on this CPU: weights prepacked for its
kernels, from headers alone.
"""

from qtale.memory.devices import Budget, Device, budget, devices, most_free, usable_devices
from qtale.memory.needed import Needs, needed
from qtale.memory.shape import ModelShape, shape_of_config, shape_of_folder
from qtale.memory.sizes import human_bytes, parse_size

__all__ = [
    "Budget",
    "Device",
    "ModelShape",
    "Needs",
    "budget",
    "devices",
    "human_bytes",
    "most_free",
    "needed",
    "parse_size",
    "shape_of_config",
    "shape_of_folder",
    "usable_devices",
]
