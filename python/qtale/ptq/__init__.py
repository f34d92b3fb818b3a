"""Post-training quantization: from a dense model folder to a quantized one, a tensor or a layer in memory at a time."""

from qtale.ptq.calibrated import solve_layers
from qtale.ptq.options import METHODS, SolverOptions
from qtale.ptq.pipeline import quantize
from qtale.ptq.worklist import LayerRow, QuantizeReport

__all__ = ["METHODS", "LayerRow", "QuantizeReport", "SolverOptions", "quantize", "solve_layers"]
