"""A causal language model of transformers without weights: its modules on the meta device, its buffers computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale.checkpoint.folder import ModelFolder
from qtale.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_MESSAGE_CHARACTERS = 300


def build_skeleton(folder: ModelFolder) -> PreTrainedModel:
    """The model of a folder's config.json in eval mode; no tensor is read.

    Raises UnsupportedError for quantized folders and for what transformers has no causal language model for.
    """
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if folder.config.get("quantization_config") is not None:
        raise UnsupportedError(f"{folder.path}: is quantized already; measure the dense model it was made from.")
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    # Config classes raise errors of many kinds for values that they do not take; so do model classes below.
    except Exception as error:
        raise UnsupportedError(f"{folder.path}: transformers cannot use its config.json: {_text(error)}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"{folder.path}: transformers has no causal language model of type {config.model_type!r}; "
            "measure takes decoder models such as Llama, Mistral, Qwen, Phi-3, Gemma 2 or OLMo 2."
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise UnsupportedError(f"{folder.path}: transformers cannot build its model: {_text(error)}") from error
    return model.eval()


def decoder_layers(model: Any, folder: ModelFolder) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder layers; UnsupportedError where there is no such list."""
    import torch

    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and name.rpartition(".")[2] == "layers":
            return name, module
    raise UnsupportedError(
        f"{folder.path}: {type(model).__name__} has no list of {count} decoder layers named 'layers'; measure takes "
        "models built as Llama is."
    )


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]} …"
