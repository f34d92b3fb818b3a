"""The fields of plan.json, checked as what people may have edited by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtale import names
from qtale.errors import InputError
from qtale.spec import GROUP_SIZES, NUM_BITS

FORMAT = "qtale.plan"
VERSION = 1
MODES = ("paper", "greedy", "knapsack", "uniform")
BITS = (16, *sorted(NUM_BITS, reverse=True))
_GROUPINGS = ("auto", "channel", *GROUP_SIZES)
_KEYS = (
    *("format", "version", "model", "mode", "metric", "budget_bytes", "needed_bytes", "group_size", "symmetric"),
    *("layers", "lm_head_bits"),
)
# What the KV cache and the workspace were reckoned for; plans without a reserve of their own have them.
_OPTIONAL_KEYS = ("context", "batch")
_MODEL_KEYS = ("fingerprint", "model_type", "num_layers")
_MOST = 2**63 - 1


def parse_plan(value: Any, where: str) -> dict[str, Any]:
    """The fields of a plan's object, without its format and version; InputError names the field and what it takes."""
    _check_format(value, where)
    fields = _exactly(value, _KEYS, where, _OPTIONAL_KEYS)
    model = _exactly(fields["model"], _MODEL_KEYS, f"{where}: 'model'")
    for key in ("fingerprint", "model_type"):
        _check(isinstance(model[key], str) and model[key], f"{where}: 'model'", key, model[key], "a text")
    _check(
        _is_count(model["num_layers"]) and model["num_layers"], where, "num_layers", model["num_layers"], "1 or more"
    )
    _check(fields["mode"] in MODES, where, "mode", fields["mode"], " or ".join(MODES))
    _check(isinstance(fields["metric"], str), where, "metric", fields["metric"], "a text")
    budget = fields["budget_bytes"]
    _check(budget is None or _is_count(budget), where, "budget_bytes", budget, "a number of bytes or null")
    _check(_is_count(fields["needed_bytes"]), where, "needed_bytes", fields["needed_bytes"], "a number of bytes")
    grouping = fields["group_size"]
    _check(_one_of(grouping, _GROUPINGS), where, "group_size", grouping, ", ".join(map(str, _GROUPINGS)))
    _check(isinstance(fields["symmetric"], bool), where, "symmetric", fields["symmetric"], "true or false")
    _check_bits(fields["lm_head_bits"], where, "lm_head_bits")
    optional = {key: fields[key] for key in _OPTIONAL_KEYS if key in fields}
    for key, count in optional.items():
        least = 1 if key == "batch" else 0
        _check(_is_count(count) and count >= least, where, key, count, f"a whole number, {least} or more")
    layers = _parse_layers(fields["layers"], model["num_layers"], where)
    dropped = ("format", "version")
    kept = {key: fields[key] for key in _KEYS if key not in dropped}
    return {**kept, **optional, "model": dict(model), "layers": layers}


def _check_format(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise InputError(f"{where}: is no plan; a plan is a JSON object whose 'format' is {FORMAT!r}.")
    if value.get("version") != VERSION:
        raise InputError(f"{where}: has version {value.get('version')!r}; this qtale reads version {VERSION}.")


def _parse_layers(value: Any, count: int, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise InputError(f"{where}: 'layers' must be a list, not {type(value).__name__}.")
    found: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(value):
        layer = entry.get("layer") if isinstance(entry, Mapping) else None
        if type(layer) is not int:
            raise InputError(f"{where}: entry {position} of 'layers' must be an object with a 'layer' number.")
        if not 0 <= layer < count:
            raise InputError(f"{where}: names layer {layer}, but the model has layers 0 to {count - 1}.")
        if layer in found:
            raise InputError(f"{where}: names layer {layer} twice.")
        found[layer] = _parse_layer(entry, f"{where}: layer {layer}")
    missing = next((layer for layer in range(count) if layer not in found), None)
    if missing is not None:
        raise InputError(f"{where}: lacks layer {missing}; every layer from 0 to {count - 1} needs its bits.")
    return [found[layer] for layer in range(count)]


def _parse_layer(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "modules" not in entry:
        fields = _exactly(entry, ("layer", "num_bits"), where)
        _check_bits(fields["num_bits"], where, "num_bits")
        return dict(fields)
    fields = _exactly(entry, ("layer", "modules"), where)
    modules = fields["modules"]
    if not isinstance(modules, Mapping) or not modules:
        raise InputError(f"{where}: 'modules' must be an object of module names and bits.")
    first: dict[str, str] = {}
    for module, bits in modules.items():
        _check_bits(bits, where, module)
        key = names.shared_spec_key(module)
        other = module if key is None else first.setdefault(key, module)
        if modules[other] != bits:
            raise InputError(
                f"{where}: {other} has {modules[other]} bits and {module} {bits}; engines fuse them into one matrix, "
                "so give both the same."
            )
    return {"layer": fields["layer"], "modules": dict(modules)}


def _exactly(value: Any, keys: Sequence[str], where: str, optional: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object, not {type(value).__name__}.")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: lacks {key!r}.")
    unknown = [key for key in value if key not in (*keys, *optional)]
    if unknown:
        raise InputError(f"{where}: has the unknown field {unknown[0]!r}; known are {', '.join((*keys, *optional))}.")
    return value


def _check_bits(value: Any, where: str, key: str) -> None:
    _check(_one_of(value, BITS), where, key, value, ", ".join(map(str, BITS)))


def _check(right: Any, where: str, key: str, value: Any, accepted: str) -> None:
    if not right:
        raise InputError(f"{where}: has {key} {value!r}; it must be {accepted}.")


def _one_of(value: Any, accepted: Sequence[Any]) -> bool:
    return any(type(value) is type(known) and value == known for known in accepted)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST
