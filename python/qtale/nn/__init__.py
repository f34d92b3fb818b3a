"""Modules of torch that compute with qtale's kernels, and their way into any model."""

from qtale.nn.linear import QLinear
from qtale.nn.replace import linear_names, replace, set_module

__all__ = ["QLinear", "linear_names", "replace", "set_module"]
