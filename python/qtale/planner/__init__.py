"""Bits for every layer: the plan, its file, and the ways to make one under a memory budget."""

from qtale.planner.make import Planner, plan
from qtale.planner.options import Options
from qtale.planner.plan import LayerBits, Plan, PlannedModel
from qtale.planner.problem import BudgetError
from qtale.planner.source import open_source

__all__ = ["BudgetError", "LayerBits", "Options", "Plan", "PlannedModel", "Planner", "open_source", "plan"]
