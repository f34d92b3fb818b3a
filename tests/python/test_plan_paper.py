"""LSAQ's own numbers (arXiv 2412.18135): the strategies of Table IV and the sizes of its models, from shapes alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import qtale
from qtale import QuantSpec
from qtale.errors import InputError
from qtale.memory import needed, shape_of_config
from qtale.planner import BudgetError, Options

FIXTURES = Path(__file__).parent / "fixtures"
GIB = 1 << 30


def strategy(budget: str, reserve: int | None = None, model: str = "llama-2-7b") -> dict[int, int]:
    options = Options(mode="paper", reserve=reserve)
    plan = qtale.plan(FIXTURES / f"{model}.json", budget, options=options, progress=False)
    assert plan.needed_bytes <= (plan.budget_bytes or 0)
    return Counter(layer.num_bits or 0 for layer in plan.layers)


@pytest.mark.parametrize("reserve", [None, int(0.335 * GIB), int(0.395 * GIB)])
@pytest.mark.parametrize(
    ("budget", "layers"),
    [("16GiB", {16: 32}), ("12GiB", {8: 32}), ("8GiB", {8: 32}), ("6GiB", {8: 22, 4: 10}), ("4GiB", {8: 1, 4: 31})],
)
def test_table_4(budget: str, layers: dict[int, int], reserve: int | None) -> None:
    assert strategy(budget, reserve) == layers


def test_the_reserve_of_table_4_has_bounds() -> None:
    assert strategy("6GiB", int(0.31 * GIB)) == {8: 23, 4: 9}
    assert strategy("4GiB", int(0.42 * GIB)) == {4: 32}


def test_the_average_of_the_6g_row_is_the_papers() -> None:
    plan = qtale.plan(FIXTURES / "llama-2-7b.json", bits=6.75, options=Options(mode="paper"))
    assert Counter(layer.num_bits for layer in plan.layers) == {8: 22, 4: 10}
    assert [layer.layer for layer in plan.layers if layer.num_bits == 4] == list(range(22, 32))


@pytest.mark.parametrize(
    ("model", "fp16", "int4"),
    [("llama-2-7b", 12.82, 3.56), ("llama-2-13b", 24.36, 6.79), ("llama-3-8b", 15.14, 5.18)],
)
def test_the_sizes_of_the_papers_models(model: str, fp16: float, int4: float) -> None:
    shape = shape_of_config(json.loads((FIXTURES / f"{model}.json").read_text()))
    dense = needed(shape, lambda _: None, context=0, batch=1).weights
    layers = {linear.name for linear in shape.linears}
    spec = QuantSpec(4, "channel")
    packed = needed(shape, lambda name: spec if name in layers else None, context=0, batch=1).weights
    assert dense / GIB == pytest.approx(fp16, rel=0.03)
    assert packed / GIB == pytest.approx(int4, rel=0.05)


def test_what_nothing_fits_is_refused_with_the_least_budget_that_would_do() -> None:
    with pytest.raises(BudgetError, match="the least budget that would do is") as caught:
        strategy("3GiB")
    least = caught.value.least
    assert f"{least} B" in str(caught.value)
    assert caught.value.budget == 3 * GIB
    assert strategy(f"{least}B") == {4: 32}
    with pytest.raises(BudgetError):
        strategy(f"{least - 1}B")


def test_a_plan_from_a_config_alone_fits_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((FIXTURES / "llama-2-7b.json").read_text())
    plan = qtale.plan(tmp_path, "16GiB", options=Options(mode="paper"))
    assert plan.model.fingerprint.startswith("config-")
    with pytest.raises(InputError, match="another model"):
        plan.check_model("ab" * 32, [])
