"""``quantization_config`` of compressed-tensors: read from llm-compressor's folders, written with exact module names.

Rules as in compressed-tensors 0.20: a module takes the scheme of an exact name first, then of a ``re:`` pattern
(matched from the start, patterns in alphabetical order), then of its class name; ``ignore`` wins over all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtale.errors import CheckpointError, UnsupportedError
from qtale.spec import NUM_BITS, PER_CHANNEL, ResolvedSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
# The release whose layout is followed; readers only show it.
LAYOUT_VERSION = "0.20.0"
GROUP_MULTIPLE = 32


@dataclass(frozen=True)
class PackedConfig:
    """Which modules are quantized and how: ``targets`` maps exact names, ``re:`` patterns and class names to specs."""

    targets: Mapping[str, ResolvedSpec]
    ignore: tuple[str, ...]

    def spec_of(self, module: str, class_name: str = "Linear") -> ResolvedSpec | None:
        """The spec of a module of the given class, or None where it is ignored or not targeted."""
        if any(_matches(module, rule, class_name) for rule in self.ignore):
            return None
        if module in self.targets:
            return self.targets[module]
        patterns = sorted(target for target in self.targets if target.startswith("re:"))
        for pattern in patterns:
            if _matches(module, pattern, class_name):
                return self.targets[pattern]
        return self.targets.get(class_name)


def parse_config(config: Mapping[str, Any], where: str) -> PackedConfig | None:
    """The quantization that a ``config.json`` declares, or None for a dense model.

    ``where`` names the folder in errors. Raises UnsupportedError for every scheme but weight-only integers in
    ``pack-quantized``, and CheckpointError for a config that is broken.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: 'quantization_config' must be an object, not {type(found).__name__}.")
    _check_method(found, where)
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: 'quantization_config' must hold 'config_groups'.")
    targets: dict[str, ResolvedSpec] = {}
    for name, group in groups.items():
        spec = _parse_group(group, f"{where}: config group {name!r}")
        targets.update(dict.fromkeys(_names(group.get("targets"), f"{where}: 'targets' of {name!r}"), spec))
    return PackedConfig(targets, tuple(_names(found.get("ignore") or [], f"{where}: 'ignore'")))


def build_config(specs: Mapping[str, ResolvedSpec], ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` for exact module names: one config group for each distinct spec, in first-seen order.

    Format source: compressed-tensors 0.20 ``QuantizationConfig``.
    """
    groups: dict[ResolvedSpec, list[str]] = {}
    for module, spec in specs.items():
        groups.setdefault(spec, []).append(module)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(spec, names) for i, (spec, names) in enumerate(groups.items())},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def _group(spec: ResolvedSpec, modules: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "group" if spec.group_size else "channel",
        "group_size": spec.group_size or None,
        "dynamic": False,
    }
    if not spec.symmetric:
        weights["zp_dtype"] = "torch.int8"
    return {
        "targets": modules,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _check_method(found: Mapping[str, Any], where: str) -> None:
    method = found.get("quant_method")
    if method != METHOD:
        raise UnsupportedError(
            f"{where}: is quantized with {method!r}; qtale reads {METHOD!r} in {FORMAT!r} form. "
            "Start from the dense model, or convert it with llm-compressor."
        )
    if found.get("format") != FORMAT:
        raise UnsupportedError(f"{where}: has the format {found.get('format')!r}; qtale reads {FORMAT!r}.")
    if found.get("quantization_status", "compressed") != "compressed":
        raise UnsupportedError(
            f"{where}: has quantization_status {found['quantization_status']!r}; save it compressed first."
        )
    for key, meaning in (("kv_cache_scheme", "a quantized KV cache"), ("transform_config", "weight transforms")):
        if found.get(key):
            raise UnsupportedError(f"{where}: asks for {meaning} ({key}), which qtale cannot run; export without it.")
    sparsity = found.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise UnsupportedError(f"{where}: has sparse weights (sparsity_config); qtale reads dense ones only.")


def _parse_group(group: Any, where: str) -> ResolvedSpec:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise UnsupportedError(f"{where}: describes no quantized weights; qtale reads weight-only schemes.")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise UnsupportedError(f"{where}: quantizes activations ({key}); qtale reads weight-only schemes.")
    if group.get("format") not in (None, FORMAT):
        raise UnsupportedError(f"{where}: has the format {group['format']!r}; qtale reads {FORMAT!r}.")
    accepted: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("type", ("int",)),
        ("num_bits", NUM_BITS),
        ("dynamic", (False,)),
        ("actorder", (None, False, "weight", "static")),
        ("symmetric", (True, False)),
    )
    defaults = {"type": "int", "dynamic": False, "symmetric": True}
    for key, values in accepted:
        value = weights.get(key, defaults.get(key))
        if not any(type(value) is type(known) and value == known for known in values):
            raise UnsupportedError(f"{where}: has {key} {value!r}; qtale reads {', '.join(map(str, values))}.")
    return ResolvedSpec(weights["num_bits"], _group_size(weights, where), weights.get("symmetric", True))


def _group_size(weights: Mapping[str, Any], where: str) -> int:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy == "channel" or (strategy is None and size == -1):
        return PER_CHANNEL
    if strategy not in ("group", None):
        raise UnsupportedError(f"{where}: has the strategy {strategy!r}; qtale reads 'group' and 'channel'.")
    if type(size) is not int or size <= 0 or size % GROUP_MULTIPLE:
        raise UnsupportedError(f"{where}: has group_size {size!r}; qtale reads multiples of {GROUP_MULTIPLE}.")
    return size


def _names(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{where} must be a list of strings.")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(f"{where} holds {item!r}, which is no regular expression: {error}.") from error
    return value


def _matches(module: str, rule: str, class_name: str) -> bool:
    if rule.startswith("re:"):
        return re.match(rule.removeprefix("re:"), module) is not None
    return rule in (module, class_name)
