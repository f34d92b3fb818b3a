"""A model of transformers without weights, and where its decoder layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale.checkpoint.architecture import build_on_meta, decoder_config
from qtale.checkpoint.folder import ModelFolder
from qtale.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def build_skeleton(folder: ModelFolder, verb: str) -> PreTrainedModel:
    """The model of a folder's config.json in eval mode; no tensor is read; ``verb`` is for errors.

    Raises UnsupportedError for quantized folders and for what transformers has no causal language model for.
    """
    import torch

    if folder.config.get("quantization_config") is not None:
        raise UnsupportedError(f"{folder.path}: is quantized already; take the dense model it was made from.")
    return build_on_meta(folder, decoder_config(folder, verb), torch.float32).eval()


def decoder_layers(model: Any, folder: ModelFolder) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder layers; UnsupportedError where there is no such list."""
    import torch

    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and name.rpartition(".")[2] == "layers":
            return name, module
    raise UnsupportedError(
        f"{folder.path}: {type(model).__name__} has no list of {count} decoder layers named 'layers'; take a model "
        "built as Llama is."
    )
