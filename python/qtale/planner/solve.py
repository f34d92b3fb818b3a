"""Solvers: one choice for each item, the total cost within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale.errors import InputError
from qtale.planner.problem import BudgetError, Item, least_cost, total_cost

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PAPER_BITS = (16, 8, 4)
# Cells of the knapsack's table: 150 items of five choices then take half a second and 20 MB.
MAX_CELLS = 1 << 17


@dataclass(frozen=True)
class Solution:
    """The chosen index for every item; ``resolution`` is the unit of cost to which a knapsack is optimal (1: exact)."""

    choices: tuple[int, ...]
    resolution: int = 1


def paper(items: Sequence[Item], importance: Sequence[float], budget: int) -> Solution:
    """The strategy of LSAQ (arXiv 2412.18135) for items that are layers with the choices 16, 8 and 4 bits.

    All 16 bits where that fits, else all 8, else the least important layers to 4 one after another until it fits;
    among equally important layers the last goes first. Raises BudgetError where all layers at 4 bits are too much.
    """
    if any(item.bits != PAPER_BITS for item in items):
        raise InputError("plan: the paper's strategy chooses among 16, 8 and 4 bits; use mode knapsack for others.")
    if len(importance) != len(items):
        raise InputError(f"plan: {len(importance)} importance scores are given for {len(items)} layers.")
    for same in (0, 1):
        choices = [same] * len(items)
        if total_cost(items, choices) <= budget:
            return Solution(tuple(choices))
    for layer in sorted(range(len(items)), key=lambda layer: (importance[layer], -layer)):
        choices[layer] = 2
        if total_cost(items, choices) <= budget:
            return Solution(tuple(choices))
    raise BudgetError(total_cost(items, choices), budget)


def uniform(items: Sequence[Item], budget: int) -> Solution:
    """The same bits everywhere, the most that fit; items that lack the width take their next wider one."""
    for bits in sorted({bits for item in items for bits in item.bits}, reverse=True):
        choices = [_at_least(item, bits) for item in items]
        if total_cost(items, choices) <= budget:
            return Solution(tuple(choices))
    raise BudgetError(total_cost(items, choices), budget)


def greedy(items: Sequence[Item], budget: int) -> Solution:
    """From the least losses down: the step that loses least for each unit of cost saved, until the budget holds.

    What the last step saved too much is given back where it still fits. Raises BudgetError.
    """
    _check_fits(items, budget)
    choices = [min(zip(item.losses, item.costs, range(len(item.bits)), strict=True))[2] for item in items]
    cost = total_cost(items, choices)
    while cost > budget:
        _, place, choice = min(
            ((item.losses[to] - item.losses[now]) / (item.costs[now] - item.costs[to]), place, to)
            for place, (item, now) in enumerate(zip(items, choices, strict=True))
            for to in range(len(item.bits))
            if item.costs[to] < item.costs[now]
        )
        cost += items[place].costs[choice] - items[place].costs[choices[place]]
        choices[place] = choice
    return Solution(tuple(_given_back(items, choices, budget - cost)))


def knapsack(items: Sequence[Item], budget: int, max_cells: int = MAX_CELLS) -> Solution:
    """The least total loss whose cost is within the budget, by dynamic programming over the cost.

    Exact where the budget has at most ``max_cells`` steps of the costs' common divisor; else costs are rounded up to
    ``resolution``, so the result stays within the budget and is optimal for every budget that is smaller
    by a resolution for each item and one more. Raises BudgetError.
    """
    _check_fits(items, budget)
    if not items:
        return Solution(())
    extra = [[cost - min(item.costs) for cost in item.costs] for item in items]
    slack = min(budget - least_cost(items), sum(max(costs) for costs in extra))
    resolution = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    if slack // resolution >= max_cells:
        resolution = -(-slack // max_cells)
    steps = [[-(-cost // resolution) for cost in costs] for costs in extra]
    return Solution(_table(items, steps, slack // resolution), resolution)


def _table(items: Sequence[Item], steps: Sequence[Sequence[int]], capacity: int) -> tuple[int, ...]:
    import numpy as np

    best: npt.NDArray[np.float64] = np.zeros(capacity + 1)
    taken = np.zeros((len(items), capacity + 1), np.int8)
    for place, item in enumerate(items):
        after = np.full(capacity + 1, np.inf)
        for choice, (step, loss) in enumerate(zip(steps[place], item.losses, strict=True)):
            if step > capacity:
                continue
            candidate = best[: capacity + 1 - step] + loss
            better = candidate < after[step:]
            after[step:][better] = candidate[better]
            taken[place, step:][better] = choice
        best = after
    choices, left = [], capacity
    for place in reversed(range(len(items))):
        choice = int(taken[place, left])
        choices.append(choice)
        left -= steps[place][choice]
    return tuple(reversed(choices))


def _given_back(items: Sequence[Item], choices: list[int], slack: int) -> list[int]:
    while True:
        steps = [
            ((item.losses[now] - item.losses[to]) / max(1, item.costs[to] - item.costs[now]), place, to)
            for place, (item, now) in enumerate(zip(items, choices, strict=True))
            for to in range(len(item.bits))
            if item.losses[to] < item.losses[now] and item.costs[to] - item.costs[now] <= slack
        ]
        if not steps:
            return choices
        _, place, to = max(steps)
        slack -= items[place].costs[to] - items[place].costs[choices[place]]
        choices[place] = to


def _at_least(item: Item, bits: int) -> int:
    wide = [i for i, own in enumerate(item.bits) if own >= bits]
    return min(wide, key=lambda i: item.bits[i]) if wide else max(range(len(item.bits)), key=lambda i: item.bits[i])


def _check_fits(items: Sequence[Item], budget: int) -> None:
    least = least_cost(items)
    if least > budget:
        raise BudgetError(least, budget)
