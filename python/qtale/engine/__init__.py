"""The engine: whole decoders of the Llama family in C++, from any HuggingFace folder, without torch.

engine = qtale.load("model")                             # dense, or as `qtale quantize` wrote it
print(engine.generate("Gravity is", max_new_tokens=40))
engine.loglikelihood([("The sky is", " blue")])
"""

from qtale.engine.chat import ChatTemplate
from qtale.engine.engine import Engine, load
from qtale.engine.generate import Generation, Piece
from qtale.engine.passes import CallReport
from qtale.engine.sampling import Sampling
from qtale.engine.session import Session

__all__ = ["CallReport", "ChatTemplate", "Engine", "Generation", "Piece", "Sampling", "Session", "load"]
