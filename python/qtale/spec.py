"""What a quantized weight looks like: bits, groups, symmetry. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qtale.errors import InputError

NUM_BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
PER_CHANNEL = 0
# How layers multiply: quantized ones, those that are not, and a whole model in the engine.
COMPUTE = ("int8", "int16", "float")
DENSE_COMPUTE = ("float", "bfloat16")
ENGINE_COMPUTE = (*COMPUTE, "bfloat16")


def check_compute(what: str, compute: str) -> None:
    """InputError of ``what`` where quantized layers do not multiply so."""
    if compute not in COMPUTE:
        known = ", ".join(map(repr, COMPUTE[:-1]))
        raise InputError(f"{what}: compute {compute!r} is not a mode; use {known} or {COMPUTE[-1]!r}.")


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec that fits one matrix: ``group_size`` divides in_features, or is 0 for one scale per output row."""

    num_bits: int
    group_size: int
    symmetric: bool

    def groups(self, in_features: int) -> int:
        """Number of scales per output row."""
        return in_features // self.group_size if self.group_size else 1


@dataclass(frozen=True)
class QuantSpec:
    """Round-to-nearest weight quantization as a user asks for it.

    ``group_size`` is 32, 64 or 128 input features that share a scale, ``"channel"`` for one scale per output row,
    or ``"auto"`` for the largest of 128, 64, 32 that divides in_features.
    Raises InputError for values outside of these.
    """

    num_bits: int = 4
    group_size: int | str = "auto"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.num_bits not in NUM_BITS:
            raise InputError(f"quantize: num_bits {self.num_bits} is not supported; use one of 2, 3, 4, 8.")
        if self.group_size not in (*GROUP_SIZES, "auto", "channel"):
            raise InputError(
                f"quantize: group_size {self.group_size!r} is not supported; use 32, 64, 128, 'channel' or 'auto'."
            )

    def resolve(self, module_name: str, in_features: int) -> ResolvedSpec:
        """The spec for ``in_features`` columns; raises InputError where an explicit size does not divide."""
        if self.group_size == "channel":
            return ResolvedSpec(self.num_bits, PER_CHANNEL, self.symmetric)
        fitting = [size for size in GROUP_SIZES if in_features % size == 0]
        if self.group_size == "auto":
            return ResolvedSpec(self.num_bits, fitting[0] if fitting else PER_CHANNEL, self.symmetric)
        if self.group_size not in fitting:
            would_do = ", ".join(map(str, fitting)) if fitting else "none of 32, 64, 128; use 'channel'"
            raise InputError(
                f"{module_name}: in_features {in_features} is not a multiple of group_size {self.group_size}; "
                f"sizes that divide it: {would_do}."
            )
        return ResolvedSpec(self.num_bits, int(self.group_size), self.symmetric)
