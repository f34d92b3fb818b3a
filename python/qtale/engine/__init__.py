"""The engine: whole decoders of the Llama family in C++, from any HuggingFace folder, without torch.

engine = qtale.load("model")                             # dense, or as `qtale quantize` wrote it
print(engine.generate("Gravity is", max_new_tokens=40))
engine.loglikelihood([("The sky is", " blue")])
"""

from qtale.engine.engine import Engine, load

__all__ = ["Engine", "load"]
