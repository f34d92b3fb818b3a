"""Scores models on real tasks with EleutherAI's lm-evaluation-harness: ``python -m qtale.eval``, ``qtale eval``."""

from qtale.eval.options import EvalOptions
from qtale.eval.run import EvalOutcome, evaluate

__all__ = ["EvalOptions", "EvalOutcome", "evaluate"]
