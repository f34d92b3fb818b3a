"""Options of routed models and of the KV cache, shared by the verbs that run one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtale.routing import RoutingOverrides


def add_routing_arguments(group: argparse._ArgumentGroup, kv_dtype: str = "auto") -> None:
    """Declare the options; ``kv_dtype`` is what the verb takes by default, in words."""
    add = group.add_argument
    add(
        "--kv-dtype",
        "--kv_dtype",
        metavar="DTYPE",
        help=f"of keys and values: auto, float16, float32, int8-keys; default {kv_dtype}",
    )
    add("--kv-rule", "--kv_rule", metavar="evict|keep", help="what tokens that skip a layer leave in its cache")
    add("--theta", type=float, metavar="P", help="least probability to run a routed layer; default as stored")
    add("--depth", metavar="LAYERS", help="run these layers only, for every token, such as 0-11,14,29")


def overrides_of(args: argparse.Namespace) -> RoutingOverrides:
    """What they say about skipped layers; InputError for values that are not accepted."""
    from qtale.routing import RoutingOverrides, parse_layers

    return RoutingOverrides(args.theta, None if args.depth is None else parse_layers(args.depth), args.kv_rule)
