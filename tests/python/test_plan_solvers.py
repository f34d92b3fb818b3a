"""The solvers against brute force, and their rules: the paper's order, waiting, and budgets that nothing fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale.errors import InputError
from qtale.planner.problem import BudgetError, Item, total_cost, total_loss
from qtale.planner.solve import Solution, greedy, knapsack, paper, uniform
from qtale.planner.wait import wait_until_it_fits

WIDTHS = (16, 8, 4, 3, 2)


def brute_force(items: Sequence[Item], budget: int) -> float:
    """The least loss within the budget, over every combination; infinite where none fits."""
    every = itertools.product(*(range(len(item.bits)) for item in items))
    return min((total_loss(items, c) for c in every if total_cost(items, c) <= budget), default=math.inf)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], int]:
    """One to five items of one to five choices with any costs and losses, and a budget near the possible ones."""
    items = []
    for place in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 5))
        numbers = st.integers(0, 60)
        costs = tuple(draw(st.lists(numbers, min_size=count, max_size=count)))
        losses = tuple(float(loss) for loss in draw(st.lists(numbers, min_size=count, max_size=count)))
        items.append(Item((f"m{place}",), WIDTHS[:count], costs, losses))
    return items, draw(st.integers(0, sum(max(item.costs) for item in items) + 5))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_knapsack_is_optimal(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    best = brute_force(items, budget)
    if best == math.inf:
        with pytest.raises(BudgetError) as caught:
            knapsack(items, budget)
        assert caught.value.least == sum(min(item.costs) for item in items)
        return
    found = knapsack(items, budget)
    assert total_cost(items, found.choices) <= budget
    assert total_loss(items, found.choices) == pytest.approx(best)
    close = greedy(items, budget)
    assert total_cost(items, close.choices) <= budget
    assert total_loss(items, close.choices) >= best - 1e-9


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 20))
def test_a_coarse_knapsack_stays_within_its_stated_resolution(problem: tuple[list[Item], int], cells: int) -> None:
    items, budget = problem
    if brute_force(items, budget) == math.inf:
        return
    found = knapsack(items, budget, cells)
    assert total_cost(items, found.choices) <= budget
    smaller = budget - found.resolution * (len(items) + 1)
    assert total_loss(items, found.choices) <= brute_force(items, smaller) + 1e-9


def test_the_knapsack_takes_common_steps_exactly_however_large_they_are() -> None:
    items = [Item((str(i),), (8, 4), (2 << 40, 1 << 40), (0.0, loss)) for i, loss in enumerate((3.0, 1.0, 2.0))]
    found = knapsack(items, 5 << 40, max_cells=8)
    assert found == Solution((0, 1, 0), 1 << 40)


def layers(count: int) -> list[Item]:
    return [Item((str(layer),), (16, 8, 4), (16, 8, 4), (0.0, 0.0, 0.0)) for layer in range(count)]


@pytest.mark.parametrize(
    ("budget", "bits"),
    [
        (64, [16, 16, 16, 16]),
        (63, [8, 8, 8, 8]),
        (32, [8, 8, 8, 8]),
        (31, [8, 4, 8, 8]),
        (28, [8, 4, 8, 8]),
        (27, [8, 4, 8, 4]),
        (20, [4, 4, 8, 4]),
        (16, [4, 4, 4, 4]),
    ],
)
def test_the_paper_lowers_the_least_important_layers_first(budget: int, bits: list[int]) -> None:
    found = paper(layers(4), [0.3, 0.1, 0.9, 0.3], budget)
    assert [(16, 8, 4)[choice] for choice in found.choices] == bits


def test_the_paper_names_the_least_budget_that_would_do() -> None:
    with pytest.raises(BudgetError, match="budget 15 is below the least that would do, 16") as caught:
        paper(layers(4), [1.0] * 4, 15)
    assert (caught.value.least, caught.value.budget) == (16, 15)
    with pytest.raises(InputError, match="3 importance scores are given for 4 layers"):
        paper(layers(4), [1.0] * 3, 64)


def test_uniform_takes_the_widest_that_fits() -> None:
    items = [*layers(2), Item(("lm_head",), (16,), (16,), (0.0,))]
    assert uniform(items, 48).choices == (0, 0, 0)
    assert uniform(items, 47).choices == (1, 1, 0)
    assert uniform(items, 24).choices == (2, 2, 0)
    with pytest.raises(BudgetError, match="24"):
        uniform(items, 23)


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.naps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


def test_waiting_tries_until_memory_is_freed(caplog: pytest.LogCaptureFixture) -> None:
    clock, free = Clock(), iter([3, 3, 5, 16])

    def attempt() -> Solution:
        return paper(layers(4), [1.0] * 4, next(free))

    with caplog.at_level("INFO", "qtale"):
        found = wait_until_it_fits(attempt, interval=7, clock=clock, sleep=clock.sleep)
    assert found.choices == (2, 2, 2, 2)
    assert clock.naps == [7, 7, 7]
    assert [record.getMessage().count("budget 3 is below") for record in caplog.records] == [1, 0]


def test_waiting_ends_with_the_reason() -> None:
    clock = Clock()

    def attempt() -> Solution:
        return paper(layers(4), [1.0] * 4, 3)

    with pytest.raises(BudgetError, match=r"least that would do, 16\. Waited 12 s") as caught:
        wait_until_it_fits(attempt, timeout=12, interval=5, clock=clock, sleep=clock.sleep)
    assert clock.naps == [5, 5, 2]
    assert caught.value.least == 16
    with pytest.raises(InputError, match="timeout -1 must be"):
        wait_until_it_fits(attempt, timeout=-1)
