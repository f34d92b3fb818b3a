"""The transformers model of a folder without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale.checkpoint.folder import ModelFolder
from qtale.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MESSAGE_CHARACTERS = 300


def decoder_config(folder: ModelFolder, operation: str) -> Any:
    """The transformers config of a folder; UnsupportedError where it is of no causal language model.

    ``operation`` is what the caller does, for the message.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    # Config classes raise errors of many kinds for values that they do not take; so do model classes below.
    except Exception as error:
        raise UnsupportedError(f"{folder.path}: transformers cannot use its config.json: {short(error)}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"{folder.path}: transformers has no causal language model of type {config.model_type!r}; "
            f"{operation} takes decoder models such as Llama, Mistral, Qwen, Phi-3, Gemma 2 or OLMo 2."
        )
    return config


def build_on_meta(folder: ModelFolder, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers, which no file holds, are computed as usual."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (folder.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder.path)
    except Exception as error:
        raise UnsupportedError(f"{folder.path}: transformers cannot build its model: {short(error)}") from error
    return model


def short(error: BaseException) -> str:
    """The text of an error in one line, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]} …"
