"""Rotary positions of a config.json: inverse frequencies and factors, as transformers computes them.

RoPE: Su et al., 2021. Scalings: linear (Chen et al., 2023), dynamic NTK, YaRN (Peng et al., 2023), Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtale.engine.values import Values
from qtale.errors import CheckpointError

Frequencies = npt.NDArray[np.float32]

DEFAULT_THETA = 10000.0
TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """``inv_freq`` holds head_dim / 2 float32 numbers; ``attention_factor`` multiplies cosines and sines.

    Where ``dynamic_length`` is not 0, sequences of n tokens beyond it take the base
    ``dynamic_base * (dynamic_factor * n / dynamic_length - (dynamic_factor - 1)) ** (head_dim / (head_dim - 2))``.
    """

    kind: str
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    dynamic_base: float = 0.0
    dynamic_factor: float = 0.0
    dynamic_length: int = 0


def read_rope(config: Values, head_dim: int, positions: int) -> Rope:
    """The rotary positions of a config for ``positions`` = max_position_embeddings.

    Reads ``rope_parameters`` (transformers 5) and ``rope_scaling`` with ``rope_theta`` (older). Raises UnsupportedError
    for other scalings and partial rotation, CheckpointError for values that make no sense.
    """
    found = config.section("rope_scaling")
    if found is None or not found.fields:
        found = config.section("rope_parameters") or Values({}, f"{config.where}: rope_parameters")
    kind = found.get("rope_type") or found.get("type") or "default"
    nested = [key for key, value in found.fields.items() if isinstance(value, dict)]
    if nested:
        raise config.unsupported(f"its rotary positions differ between layers ({', '.join(nested)})")
    if not isinstance(kind, str) or kind not in TYPES:
        raise config.unsupported(f"has the rope_type {kind!r} (known are {', '.join(TYPES)})")
    if any(values.number("partial_rotary_factor", 1.0) != 1.0 for values in (found, config)):
        raise config.unsupported("rotates only a part of each head (partial_rotary_factor)")
    base = found.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    maker = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}.get(kind)
    try:
        with np.errstate(all="ignore"):
            rope = maker(config, found, base, head_dim, positions) if maker else _rope(kind, _plain(base, head_dim))
    except (ArithmeticError, ValueError) as error:
        raise CheckpointError(f"{found.where}: its numbers give no frequencies ({error}).") from error
    if not (np.isfinite(rope.inv_freq).all() and math.isfinite(rope.attention_factor)):
        raise CheckpointError(f"{found.where}: gives frequencies that are no finite numbers.")
    return rope


def _rope(kind: str, inv_freq: Frequencies, **more: Any) -> Rope:
    return Rope(kind, tuple(inv_freq.tolist()), **more)


def _powers(base: float, dim: int) -> Frequencies:
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    # Rounded once from float64: numpy's own float32 power is further from torch's.
    powers: Frequencies = np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(base: float, dim: int) -> Frequencies:
    inverse: Frequencies = np.float32(1) / _powers(base, dim)
    return inverse


def _linear(config: Values, found: Values, base: float, dim: int, positions: int) -> Rope:
    return _rope("linear", _plain(base, dim) / np.float32(found.number("factor")))


def _dynamic(config: Values, found: Values, base: float, dim: int, positions: int) -> Rope:
    if dim <= 2:
        raise CheckpointError(f"{found.where}: dynamic scaling needs heads wider than 2.")
    factor = found.number("factor")
    if factor < 1:
        raise CheckpointError(f"{found.where}: factor is {factor:g}; dynamic scaling takes one from 1 on.")
    dynamic = {"dynamic_base": base, "dynamic_factor": factor, "dynamic_length": positions}
    return _rope("dynamic", _plain(base, dim), **dynamic)


def _original_length(config: Values, found: Values, positions: int) -> int:
    """Positions that the model was trained on before it was scaled."""
    return config.count("original_max_position_embeddings", found.count("original_max_position_embeddings", positions))


def _llama3(config: Values, found: Values, base: float, dim: int, positions: int) -> Rope:
    factor = np.float32(found.number("factor"))
    low, high = found.number("low_freq_factor"), found.number("high_freq_factor")
    length = _original_length(config, found, positions)
    if high <= low:
        raise CheckpointError(f"{found.where}: high_freq_factor {high:g} must be above low_freq_factor {low:g}.")
    plain = _plain(base, dim)
    wavelength = np.float32(2 * math.pi) / plain
    scaled = np.where(wavelength > np.float32(length / low), plain / factor, plain)
    smooth = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    is_between = (wavelength >= np.float32(length / high)) & (wavelength <= np.float32(length / low))
    return _rope("llama3", np.where(is_between, between, scaled))


def _yarn(config: Values, found: Values, base: float, dim: int, positions: int) -> Rope:
    length = _original_length(config, found, positions)
    factor = found.number("factor", positions / length)
    if base <= 1:
        raise CheckpointError(f"{found.where}: rope_theta {base:g} must be above 1 for yarn.")
    fast, slow = found.number("beta_fast", 32.0), found.number("beta_slow", 1.0)
    first, last = (dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
    if found.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0.0
    steps = (np.arange(dim // 2).astype(np.float32) - np.float32(first)) / np.float32(last - first)
    plain_share = np.float32(1) - np.clip(steps, np.float32(0), np.float32(1))
    powers = _powers(base, dim)
    inv_freq = (np.float32(1) / (np.float32(factor) * powers)) * (np.float32(1) - plain_share)
    inv_freq = inv_freq + (np.float32(1) / powers) * plain_share
    return _rope("yarn", inv_freq, attention_factor=_yarn_attention(found, factor))


def _yarn_attention(found: Values, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if found.get("attention_factor") is not None:
        return found.number("attention_factor")
    if found.get("mscale") and found.get("mscale_all_dim"):
        return scale(found.number("mscale")) / scale(found.number("mscale_all_dim"))
    return scale(1.0)
