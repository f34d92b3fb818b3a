"""Post-training quantization: from a dense model folder to a quantized one, one tensor in memory at a time."""

from qtale.ptq.pipeline import quantize
from qtale.ptq.worklist import LayerRow, QuantizeReport

__all__ = ["LayerRow", "QuantizeReport", "quantize"]
