"""Bits for every layer: the plan, its file, and the ways to make one under a memory budget."""

from qtale.planner.plan import LayerBits, Plan, PlannedModel

__all__ = ["LayerBits", "Plan", "PlannedModel"]
