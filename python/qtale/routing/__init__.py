"""Routed execution: which tokens run which layers, and the files that say so."""

from qtale.routing.files import ROUTER_FILE, SETTINGS_FILE, read_routing, write_routing
from qtale.routing.overrides import RoutingOverrides, checked_theta, depth_mask, parse_layers
from qtale.routing.routing import EVICT, KEEP, KV_RULES, RouterWeights, Routing

__all__ = [
    "EVICT",
    "KEEP",
    "KV_RULES",
    "ROUTER_FILE",
    "SETTINGS_FILE",
    "RouterWeights",
    "Routing",
    "RoutingOverrides",
    "checked_theta",
    "depth_mask",
    "parse_layers",
    "read_routing",
    "write_routing",
]
