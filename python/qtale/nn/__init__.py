"""Modules of torch that compute with qtale's kernels, and their way into any model."""

from qtale.nn.linear import QLinear
from qtale.nn.replace import linear_names, replace, set_module
from qtale.nn.routed import RoutedLayer, Router

__all__ = ["QLinear", "RoutedLayer", "Router", "linear_names", "replace", "set_module"]
