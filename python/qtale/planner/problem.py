"""The allocation problem: parts of a model, the bits that each may get, what they cost and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtale.errors import InputError


@dataclass(frozen=True)
class Item:
    """Modules that share their bits. Choice i has ``bits[i]``, costs ``costs[i]`` and loses ``losses[i]``.

    Costs are whole numbers, of bytes under a memory budget and of bits under an average; losses are 0 or more.
    """

    modules: tuple[str, ...]
    bits: tuple[int, ...]
    costs: tuple[int, ...]
    losses: tuple[float, ...]


class BudgetError(InputError):
    """Nothing fits the budget; ``least`` is the smallest that would do, in the units of the costs."""

    def __init__(self, least: int, budget: int, message: str = "") -> None:
        super().__init__(message or f"plan: the budget {budget} is below the least that would do, {least}.")
        self.least = least
        self.budget = budget


def least_cost(items: Sequence[Item]) -> int:
    """The cost of the cheapest choices."""
    return sum(min(item.costs) for item in items)


def total_cost(items: Sequence[Item], choices: Sequence[int]) -> int:
    """The cost of one choice for each item."""
    return sum(item.costs[choice] for item, choice in zip(items, choices, strict=True))


def total_loss(items: Sequence[Item], choices: Sequence[int]) -> float:
    """The loss of one choice for each item."""
    return sum(item.losses[choice] for item, choice in zip(items, choices, strict=True))
