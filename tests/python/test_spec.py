"""Specs as users ask for them, resolved for a matrix."""

from __future__ import annotations

from typing import Any

import pytest

from qtale import InputError, QuantSpec
from qtale.spec import ResolvedSpec


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (576, 64), (96, 32), (172, 0), (8, 0)])
def test_auto_takes_the_largest_group_that_divides(columns: int, group: int) -> None:
    assert QuantSpec().resolve("m", columns) == ResolvedSpec(4, group, True)


def test_channel_has_one_group() -> None:
    resolved = QuantSpec(8, "channel", symmetric=False).resolve("m", 576)
    assert resolved == ResolvedSpec(8, 0, False)
    assert resolved.groups(576) == 1
    assert QuantSpec(4, 64).resolve("m", 576).groups(576) == 9


def test_a_group_that_does_not_divide_names_the_module_and_what_would_do() -> None:
    with pytest.raises(InputError, match=r"model\.layers\.0\.x: in_features 576 .* group_size 128.*: 64, 32"):
        QuantSpec(4, 128).resolve("model.layers.0.x", 576)
    with pytest.raises(InputError, match="none of 32, 64, 128; use 'channel'"):
        QuantSpec(4, 32).resolve("m", 172)


@pytest.mark.parametrize("arguments", [{"num_bits": 5}, {"num_bits": 0}, {"group_size": 48}, {"group_size": "row"}])
def test_wrong_values_are_errors(arguments: dict[str, Any]) -> None:
    value = next(iter(arguments.values()))
    with pytest.raises(InputError, match=f"{value!r} is not supported; use"):
        QuantSpec(**arguments)
