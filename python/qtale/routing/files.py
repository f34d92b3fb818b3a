"""The side files of a routed model, qtale.json and router.safetensors; docs/format.md describes them.

Other loaders do not know these files and open the folder as the dense model that it also is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtale.checkpoint.index import read_json_object
from qtale.checkpoint.safetensors import Shard, read_header, read_raw
from qtale.checkpoint.writer import ShardWriter, TensorShape
from qtale.errors import CheckpointError, InputError
from qtale.files import write_whole
from qtale.routing.routing import RouterWeights, Routing

SETTINGS_FILE = "qtale.json"
ROUTER_FILE = "router.safetensors"
FORMAT, ROUTER_FORMAT, VERSION = "qtale.model", "qtale.router", 1
_ROUTING_KEYS = {"theta", "forced_tokens", "kv_rule", "norm_eps", "layers"}
_PARTS = ("w1", "bias1", "norm", "w2", "bias2")


def read_routing(folder: Path, num_layers: int, hidden_size: int) -> Routing | None:
    """The routing of a model folder, or None where it has none.

    Raises CheckpointError where the files are broken, do not belong together or do not fit the model.
    """
    settings = folder / SETTINGS_FILE
    if not settings.exists():
        if (folder / ROUTER_FILE).exists():
            raise CheckpointError(f"{folder}: has {ROUTER_FILE} but no {SETTINGS_FILE}, which says how to use it.")
        return None
    fields = _read_settings(settings)
    if fields is None:
        return None
    shard = _read_router_header(folder / ROUTER_FILE) if fields["layers"] else None
    routers = {layer: _read_router(shard, layer, fields["norm_eps"]) for layer in fields["layers"] if shard is not None}
    known = {f"layers.{layer}.{part}" for layer in fields["layers"] for part in _PARTS}
    unknown = sorted(set(shard.tensors if shard is not None else ()) - known)
    if unknown:
        raise CheckpointError(f"{folder / ROUTER_FILE}: holds {unknown[0]!r}, which {SETTINGS_FILE} does not name.")
    routing = Routing(routers, fields["theta"], fields["forced_tokens"], fields["kv_rule"])
    try:
        routing.check(num_layers, hidden_size, str(folder))
    except InputError as error:
        raise CheckpointError(str(error)) from error
    return routing


def write_routing(folder: Path, routing: Routing, num_layers: int, hidden_size: int) -> None:
    """Write the side files into a model folder, replacing those that were there; each appears whole.

    Raises InputError where the routing does not fit, Error where a file cannot be written.
    """
    routing.check(num_layers, hidden_size, str(folder))
    eps = {router.norm_eps for router in routing.routers.values()} or {RouterWeights.norm_eps}
    if len(eps) != 1:
        raise InputError(f"{folder}: routers have different norm_eps ({sorted(eps)}); use one for all.")
    arrays = {
        f"layers.{layer}.{name}": value
        for layer, router in sorted(routing.routers.items())
        for name, value in router.tensors().items()
    }
    partial = folder / f".{ROUTER_FILE}.partial"
    try:
        with ShardWriter(partial, [TensorShape(n, "F32", a.shape) for n, a in arrays.items()], _metadata()) as writer:
            for name, array in arrays.items():
                writer.write(name, np.ascontiguousarray(array, dtype=np.float32))
        partial.replace(folder / ROUTER_FILE)
    finally:
        partial.unlink(missing_ok=True)
    fields = {
        "theta": routing.theta,
        "forced_tokens": routing.forced_tokens,
        "kv_rule": routing.kv_rule,
        "norm_eps": eps.pop(),
        "layers": sorted(routing.routers),
    }
    text = json.dumps({"format": FORMAT, "version": VERSION, "routing": fields}, indent=2)
    write_whole(folder / SETTINGS_FILE, text + "\n")


def _metadata() -> dict[str, str]:
    # Metadata of safetensors are texts.
    return {"format": ROUTER_FORMAT, "version": str(VERSION)}


def _read_settings(path: Path) -> dict[str, Any] | None:
    value = read_json_object(path)
    _check_format(path, value, FORMAT, VERSION)
    fields = value.get("routing")
    if fields is None:
        return None
    if not isinstance(fields, Mapping) or set(fields) != _ROUTING_KEYS:
        raise CheckpointError(f"{path}: 'routing' must hold exactly {', '.join(sorted(_ROUTING_KEYS))}.")
    layers = fields["layers"]
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers) or layers != sorted(set(layers)):
        raise CheckpointError(f"{path}: 'layers' is {layers!r}; it must list layer numbers in ascending order.")
    for name in ("theta", "norm_eps"):
        if type(fields[name]) not in (int, float):
            raise CheckpointError(f"{path}: {name!r} is {fields[name]!r}; it must be a number.")
    return dict(fields)


def _read_router_header(path: Path) -> Shard:
    shard = read_header(path)
    _check_format(path, shard.metadata, ROUTER_FORMAT, str(VERSION))
    return shard


def _check_format(path: Path, fields: Mapping[str, Any], expected: str, version: int | str) -> None:
    if fields.get("format") != expected:
        raise CheckpointError(f"{path}: has format {fields.get('format')!r}; expected {expected!r}.")
    if fields.get("version") != version:
        raise CheckpointError(f"{path}: has version {fields.get('version')!r}; this qtale reads version {version!r}.")


def _read_router(shard: Shard, layer: int, norm_eps: float) -> RouterWeights:
    parts: dict[str, Any] = dict.fromkeys(_PARTS)
    for part in _PARTS:
        info = shard.tensors.get(f"layers.{layer}.{part}")
        if info is None:
            continue
        if info.dtype != "F32":
            raise CheckpointError(f"{shard.path}: {info.name} is {info.dtype}; routers are stored as F32.")
        parts[part] = read_raw(shard.path, info).view(np.float32).reshape(info.shape)
    if parts["w1"] is None:
        raise CheckpointError(f"{shard.path}: layers.{layer}.w1 is missing.")
    return RouterWeights(**parts, norm_eps=norm_eps)
