"""Which layers matter: scores of every decoder layer, measured layer by layer (LSAQ and what it is compared with)."""

from qtale.importance.file import Importance
from qtale.importance.measure import measure_tokens
from qtale.importance.options import METRICS, MeasureOptions

__all__ = ["METRICS", "Importance", "MeasureOptions", "measure_tokens"]
