"""Memory: what is free on this machine's devices, and what a model needs."""

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
