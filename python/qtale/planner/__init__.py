"""Bits for every layer: the plan, its file, and the ways to make one under a memory budget.

    plan = qtale.plan("importance.json", "6GiB")            # or bits=4.5, or budget "auto": what is free
    plan.write("plan.json")                                  # for people to read and edit
    qtale.quantize("model", "out", plan="plan.json")

Modes (``Options.mode``): ``knapsack`` loses least by importance times rounding error, optimal to the resolution that
it logs; ``greedy`` takes the step that loses least for each byte; ``paper`` is LSAQ's rule over whole layers at 16, 8
and 4 bits; ``uniform`` gives every layer the same. No score is best at every budget: ``Options(metric="best")`` runs
the plans of several on the calibration sequences and takes the one that changes the predictions least. A
:class:`Planner` keeps sizes and losses for plans under other budgets of the same model.
"""

from qtale.planner.make import Planner, plan
from qtale.planner.options import Options
from qtale.planner.plan import LayerBits, Plan, PlannedModel
from qtale.planner.problem import BudgetError
from qtale.planner.source import open_source

__all__ = ["BudgetError", "LayerBits", "Options", "Plan", "PlannedModel", "Planner", "open_source", "plan"]
