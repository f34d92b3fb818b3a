"""The plan: how many bits every layer of one model gets. Plain data, no torch, no numpy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale import names
from qtale.errors import InputError
from qtale.files import read_json, write_whole
from qtale.planner.fields import parse_plan
from qtale.spec import QuantSpec

AS_STORED = 16
HEAD = "lm_head"
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class PlannedModel:
    """The model that a plan is for; ``fingerprint`` is :func:`qtale.checkpoint.fingerprint` of its folder."""

    fingerprint: str
    model_type: str
    num_layers: int


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer (decoder block): ``num_bits`` for all of it, or ``modules`` by name inside the layer."""

    layer: int
    num_bits: int | None = None
    modules: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if (self.num_bits is None) == (self.modules is None):
            raise InputError(f"plan: layer {self.layer} takes num_bits or modules, exactly one of them.")

    def bits_of(self, module: str) -> int:
        """Bits of a Linear by its name inside the layer; InputError where the layer lists modules but not this one."""
        if self.num_bits is not None:
            return self.num_bits
        modules = self.modules or {}
        if module not in modules:
            raise InputError(f"plan: layer {self.layer} gives no bits for {module!r}; it lists {', '.join(modules)}.")
        return modules[module]

    def to_json(self) -> dict[str, Any]:
        """The layer's entry in plan.json."""
        if self.modules is None:
            return {"layer": self.layer, "num_bits": self.num_bits}
        return {"layer": self.layer, "modules": dict(self.modules)}


@dataclass(frozen=True)
class Plan:
    """Bits for every layer of one model; 16 bits mean that a module stays as it is stored.

    ``metric`` names the importance score that was used, ``budget_bytes`` is None where no budget was asked for, and
    ``needed_bytes`` is what weights, KV cache and workspace (or the reserve in their place) take under the plan.
    ``context`` and ``batch`` are what cache and workspace were reckoned for; None where a reserve stood for them.
    """

    model: PlannedModel
    mode: str
    metric: str
    budget_bytes: int | None
    needed_bytes: int
    group_size: int | str
    symmetric: bool
    layers: tuple[LayerBits, ...]
    lm_head_bits: int = AS_STORED
    context: int | None = None
    batch: int | None = None

    def bits_of(self, module: str) -> int:
        """Bits of a Linear by its full name (``model.layers.3.mlp.up_proj``, ``lm_head``); 16 outside of both.

        Raises InputError for a layer or module that the plan does not know.
        """
        if module == HEAD:
            return self.lm_head_bits
        place = names.split_block(module)
        if place is None:
            return AS_STORED
        layer, inside = place
        if layer >= len(self.layers):
            raise InputError(f"plan: has layers 0 to {len(self.layers) - 1}, but {module} lies in layer {layer}.")
        return self.layers[layer].bits_of(inside)

    def spec_of(self, module: str) -> QuantSpec | None:
        """The spec of a Linear by its full name, None where it stays as stored; raises as :meth:`bits_of`."""
        bits = self.bits_of(module)
        return None if bits == AS_STORED else QuantSpec(bits, self.group_size, self.symmetric)

    def check_model(self, fingerprint: str, modules: Iterable[str]) -> None:
        """Raise InputError unless the plan was made for the model of this fingerprint and covers its Linears exactly.

        ``modules`` are the full names of every Linear in the model's decoder blocks.
        """
        if fingerprint != self.model.fingerprint:
            raise InputError(
                f"plan: was made for another model (fingerprint {self.model.fingerprint[:12]}, "
                f"{self.model.model_type} of {self.model.num_layers} layers), not for this one "
                f"({fingerprint[:12]}); make a new plan from this model."
            )
        found: dict[int, set[str]] = {}
        for module in modules:
            place = names.split_block(module)
            if place is not None:
                found.setdefault(place[0], set()).add(place[1])
                self.bits_of(module)
        for entry in self.layers:
            unknown = sorted(set(entry.modules or ()) - found.get(entry.layer, set()))
            if unknown or entry.layer not in found:
                what = f"module {unknown[0]!r} in layer {entry.layer}" if unknown else f"layer {entry.layer}"
                raise InputError(f"plan: names {what}, which the model does not have; correct the plan.")

    def to_json(self) -> dict[str, Any]:
        """The object that plan.json holds."""
        sized = {"context": self.context, "batch": self.batch}
        return {
            "format": "qtale.plan",
            "version": 1,
            "model": {
                "fingerprint": self.model.fingerprint,
                "model_type": self.model.model_type,
                "num_layers": self.model.num_layers,
            },
            "mode": self.mode,
            "metric": self.metric,
            "budget_bytes": self.budget_bytes,
            "needed_bytes": self.needed_bytes,
            **{key: count for key, count in sized.items() if count is not None},
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "layers": [layer.to_json() for layer in self.layers],
            "lm_head_bits": self.lm_head_bits,
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "plan") -> Plan:
        """A plan from the object that :meth:`to_json` gives, every field checked; ``where`` names it in errors.

        Raises InputError for missing, unknown or wrong fields, unknown or repeated layers, bits other than 16, 8, 4, 3,
        2, and q/k/v or gate/up with different bits.
        """
        fields = parse_plan(value, where)
        model, layers = PlannedModel(**fields.pop("model")), tuple(LayerBits(**entry) for entry in fields.pop("layers"))
        return cls(model=model, layers=layers, **fields)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file; raises InputError where it is missing, no JSON or not a valid plan."""
        path = Path(path).expanduser()
        return cls.from_json(read_json(path, "`qtale plan`", _MAX_FILE_BYTES, unique=True), str(path))

    def write(self, path: str | Path) -> None:
        """Write the plan, one layer a line for people to edit, replacing a file that is there. Raises Error."""
        write_whole(Path(path).expanduser(), self.text())

    def text(self) -> str:
        """The text of plan.json."""
        value = self.to_json()
        layers = ",\n    ".join(json.dumps(entry) for entry in value["layers"])
        value["layers"] = []
        shell = json.dumps(value, indent=2, ensure_ascii=False)
        return shell.replace('"layers": []', f'"layers": [\n    {layers}\n  ]', 1) + "\n"
