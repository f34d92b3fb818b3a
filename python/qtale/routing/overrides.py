"""What a run chooses about skipped layers in place of what the model's folder says."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtale.errors import InputError
from qtale.routing.routing import KV_RULES

# More than any model has; a mistyped range is refused before it is counted out.
MOST_LAYERS = 1 << 16


@dataclass(frozen=True)
class RoutingOverrides:
    """The threshold ``theta`` of routers, or the ``layers`` that run alone, and the ``kv_rule``; None: as stored.

    Raises InputError for a theta that is no probability, for theta and layers together, and for other rules.
    """

    theta: float | None = None
    layers: tuple[int, ...] | None = None
    kv_rule: str | None = None

    def __post_init__(self) -> None:
        if self.kv_rule is not None and self.kv_rule not in KV_RULES:
            raise InputError(f"--kv-rule {self.kv_rule!r} is not known; use {' or '.join(KV_RULES)}.")
        if self.theta is None:
            return
        checked_theta(self.theta)
        if self.layers is not None:
            raise InputError("--theta, --depth: with a depth no router decides, so theta has no effect; give one.")

    def check(self, routed: Collection[int], where: str) -> None:
        """Raises InputError where the model, which has routers in the layers ``routed``, has no use for one of them."""
        if routed:
            return
        if self.theta is not None:
            raise InputError(f"--theta {self.theta:g}: {where} has no routers for it; leave it out.")
        if self.kv_rule is not None and self.layers is None:
            raise InputError(f"--kv-rule {self.kv_rule}: no token of {where} skips a layer; leave it out.")


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of '0-11,14,29', ascending; InputError for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        last = last if dash else first
        # Python counts out no numbers of thousands of digits.
        digits = first.isdecimal() and last.isdecimal() and max(len(first), len(last)) < 10
        if not (digits and int(first) <= int(last) < MOST_LAYERS):
            raise InputError(
                f"--depth {text!r}: {part.strip()!r} is no layer and no range of layers; use numbers and ranges with "
                "commas between, such as 0-11,14,29."
            )
        found.update(range(int(first), int(last) + 1))
    return tuple(sorted(found))


def checked_theta(theta: Any) -> float:
    """A threshold as a float; InputError where it is no probability."""
    if isinstance(theta, bool) or not isinstance(theta, (int, float, np.number)) or not 0 <= theta <= 1:
        raise InputError(f"theta {theta!r} is not accepted; it is a probability, so use a number from 0 to 1.")
    return float(theta)


def depth_mask(layers: Iterable[Any] | None, num_layers: int) -> list[bool] | None:
    """Whether each of ``num_layers`` layers runs, None for all; InputError for numbers that are no layers."""
    if layers is None:
        return None
    if not isinstance(layers, Iterable):
        raise InputError(f"set_depth: {layers!r} is no list of layers; give their numbers, or None for all.")
    chosen = set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise InputError(f"set_depth: layer {layer!r} is no integer; give numbers from 0 to {num_layers - 1}.")
        if not 0 <= layer < num_layers:
            raise InputError(f"set_depth: there is no layer {layer}; they are 0 to {num_layers - 1}.")
        chosen.add(int(layer))
    return [layer in chosen for layer in range(num_layers)]
