"""``qtale.plan``: from scores, sizes and a budget to bits for every layer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtale.errors import InputError
from qtale.memory.devices import AUTO, Budget
from qtale.memory.devices import budget as read_budget
from qtale.memory.needed import kv_bytes, linear_bytes, needed, workspace_bytes
from qtale.memory.runtime import TORCH
from qtale.memory.sizes import human_bytes
from qtale.planner import items as parts
from qtale.planner import solve
from qtale.planner.expected import ExpectedLoss
from qtale.planner.options import Options
from qtale.planner.plan import Plan
from qtale.planner.problem import BudgetError, Item, least_cost, total_cost
from qtale.planner.scores import BEST, chosen_metric, layer_scores, rival_metrics
from qtale.planner.source import Source, open_source
from qtale.planner.trial import least_divergent
from qtale.planner.wait import wait_until_it_fits

_logger = logging.getLogger("qtale")


@dataclass(frozen=True)
class Planner:
    """Plans for one model under any budget; sizes and losses are computed once, on the first plan.

    ``errors`` is a file that keeps the table of rounding errors between runs. ``backend`` is what will run the model:
    see :func:`qtale.memory.needed`.
    """

    source: Source
    options: Options
    errors: str | Path | None = None
    progress: bool = True
    backend: str = TORCH

    def for_bytes(self, budget: int) -> Plan:
        """The plan that fits ``budget`` bytes; raises BudgetError (an InputError) naming the least that would do."""
        if self.metric == BEST:
            return self._best(lambda rival: rival.for_bytes(budget))
        fixed = self.fixed_bytes
        try:
            items, choices = self._decided(budget - fixed) or self._weighed(budget - fixed)
        except BudgetError as error:
            least = error.least + fixed
            raise BudgetError(least, budget, self._too_small(least, budget)) from error
        return self._plan(items, choices, budget)

    def for_average(self, bits: float) -> Plan:
        """The plan whose codes take at most ``bits`` per weight over the Linears of the decoder blocks.

        Raises InputError for averages below the least of the choices and where bits for the head are to be chosen.
        """
        if not 0 < bits <= 16:
            raise InputError(f"plan: an average of {bits} bits; give a number between 2 and 16.")
        if self.options.head_bits == AUTO:
            raise InputError("plan: an average says nothing about the head; give its bits, or a budget in bytes.")
        if self.metric == BEST:
            return self._best(lambda rival: rival.for_average(bits))
        items = self._items(parts.bit_cost)
        try:
            return self._plan(items, self._solve(items, int(bits * self.source.shape.weights)), None)
        except BudgetError as error:
            least = error.least / self.source.shape.weights
            raise InputError(
                f"plan: an average of {bits} bits is below the least of the choices, {least:g}."
            ) from error

    @functools.cached_property
    def metric(self) -> str:
        """The importance score in use."""
        return chosen_metric(self.source.importance, self.options.metric, self.options.mode)

    def _best(self, make: Callable[[Planner], Plan]) -> Plan:
        """Of the plans by several scores the one that runs best."""
        return least_divergent(self.source, [make(rival) for rival in self._rivals], progress=self.progress)

    @functools.cached_property
    def _rivals(self) -> tuple[Planner, ...]:
        metrics = () if self.source.importance is None else rival_metrics(self.source.importance)
        return tuple(
            dataclasses.replace(self, options=dataclasses.replace(self.options, metric=name)) for name in metrics
        )

    @functools.cached_property
    def fixed_bytes(self) -> int:
        """What no choice of bits changes: embedding, norms, a head of given bits, and the reserve."""
        shape = self.source.shape
        needs = needed(shape, lambda _: None, context=0, batch=1, backend=self.backend)
        head = 0
        if shape.head is not None and self.options.head_bits != AUTO:
            head = linear_bytes(shape.head, self.options.spec(parts.head_bits(shape, self.options, {})))
        return needs.embedding + needs.other + head + self.reserve_bytes

    @property
    def reserve_bytes(self) -> int:
        """What is kept beside the weights: the option ``reserve``, else KV cache and workspace."""
        options, shape = self.options, self.source.shape
        if options.reserve is not None:
            return options.reserve
        size = (shape, options.context, options.batch, self.backend)
        return kv_bytes(*size) + workspace_bytes(*size)

    @functools.cached_property
    def _scores(self) -> tuple[float, ...]:
        return layer_scores(self.source.importance, self.metric, self.source.shape.num_layers)

    def _decided(self, budget: int) -> tuple[list[Item], tuple[int, ...]] | None:
        """Everything as stored where that fits, found without the losses; raises BudgetError where nothing fits."""
        items = self._unweighed(parts.byte_cost(self.options))
        if least_cost(items) > budget:
            raise BudgetError(least_cost(items), budget)
        stored = tuple(item.bits.index(16) if 16 in item.bits else -1 for item in items)
        return (items, stored) if -1 not in stored and total_cost(items, stored) <= budget else None

    def _weighed(self, budget: int) -> tuple[list[Item], tuple[int, ...]]:
        items = self._items(parts.byte_cost(self.options))
        return items, self._solve(items, budget)

    def _unweighed(self, cost: parts.Cost) -> list[Item]:
        return parts.build_items(self.source.shape, self.options, cost, lambda linear, bits: 0.0)

    def _items(self, cost: parts.Cost) -> list[Item]:
        if self.options.mode in ("paper", "uniform"):
            return self._unweighed(cost)
        return parts.build_items(self.source.shape, self.options, cost, self._expected.of)

    @functools.cached_property
    def _expected(self) -> ExpectedLoss:
        return ExpectedLoss.make(self.source, self.options, self.metric, self.errors, self.progress)

    def _solve(self, items: list[Item], budget: int) -> tuple[int, ...]:
        mode = self.options.mode
        if mode == "paper":
            return solve.paper(items, self._scores, budget).choices
        if mode == "uniform":
            return solve.uniform(items, budget).choices
        if mode == "greedy":
            return solve.greedy(items, budget).choices
        found = solve.knapsack(items, budget)
        _logger.info("knapsack: %d to spend, optimal to steps of %d", budget, found.resolution)
        return found.choices

    def _plan(self, items: list[Item], choices: tuple[int, ...], budget: int | None) -> Plan:
        shape, options = self.source.shape, self.options
        chosen = parts.chosen_bits(items, choices)
        size = sum(linear_bytes(linear, options.spec(chosen[linear.name])) for linear in shape.linears)
        head = parts.head_bits(shape, options, chosen)
        if shape.head is not None and options.head_bits == AUTO:
            size += linear_bytes(shape.head, options.spec(head))
        return Plan(
            model=self.source.model,
            mode=options.mode,
            metric=self.metric,
            budget_bytes=budget,
            needed_bytes=self.fixed_bytes + size,
            group_size=options.group_size or AUTO,
            symmetric=options.symmetric,
            layers=parts.layer_bits(shape, chosen),
            lm_head_bits=head,
            context=options.context if options.reserve is None else None,
            batch=options.batch if options.reserve is None else None,
        )

    def _too_small(self, least: int, budget: int) -> str:
        bits = min(self.options.choices or (16,))
        kept = "the reserve" if self.options.reserve is not None else "KV cache and workspace"
        return (
            f"plan: {human_bytes(budget)} ({budget} B) do not hold this model; the least budget that would do is "
            f"{least} B ({human_bytes(least)}), with every layer at {bits} bits and {human_bytes(self.reserve_bytes)} "
            f"for {kept}. Free memory, plan for less context or batch, or allow fewer bits."
        )


def plan(
    source: str | Path,
    budget: int | str | None = None,
    *,
    bits: float | None = None,
    options: Options | None = None,
    model: str | Path | None = None,
    errors: str | Path | None = None,
    wait: bool = False,
    timeout: float | None = None,
    probe: Callable[[], Budget] | None = None,
    progress: bool = True,
) -> Plan:
    """Bits for every layer of a model, within ``budget`` or at an average of ``bits``.

    ``source`` is importance.json, a model folder, a hub name or a config.json (layers then count the same); ``model``
    the folder where it is not at the place that importance.json names. ``budget`` is a number of bytes, a size such as
    "6GiB" or "auto" (the default): ``QTALE_MEMORY_BUDGET``, else what is free on the device with the most free memory.
    ``options`` say how bits are chosen, ``errors`` names a file that keeps the rounding errors between runs.
    ``wait`` asks again until the plan fits, at most ``timeout`` seconds; ``probe`` replaces the look at the memory.

    Raises BudgetError (an InputError) where nothing fits, naming the least budget that would; InputError for wrong
    values and for scores of another model; CheckpointError and UnsupportedError for models that cannot be planned.
    """
    if bits is not None and (budget is not None or wait):
        raise InputError("plan: bits and a budget (or waiting for one) exclude each other; give one of them.")
    planner = Planner(open_source(source, model), (options or Options()).resolved(), errors, progress)
    if planner.metric == "none" and planner.options.mode == "paper":
        _logger.warning("no importance scores: all layers count the same, and the last ones get fewer bits first")
    if bits is not None:
        return planner.for_average(bits)
    look = probe or functools.partial(read_budget, AUTO if budget is None else budget)

    def attempt() -> Plan:
        found = look()
        _logger.info("budget: %s (%s)", human_bytes(found.num_bytes), found.source)
        return planner.for_bytes(found.num_bytes)

    if not wait:
        return attempt()
    if probe is None and look().source == "given":
        raise InputError("plan: waiting follows the free memory, which a given budget does not; use budget auto.")
    return wait_until_it_fits(attempt, timeout=timeout)
