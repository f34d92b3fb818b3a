"""Loads a model to be scored: dense, quantized on disk, or dense and quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint import open_folder, resolve
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.spec import COMPUTE, QuantSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("default", "auto", "float32", "bfloat16", "float16")
DEMO = "demo"
_LOADER_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


def model_folder(model: str | Path) -> Path:
    """The folder of a model: "demo", a path or a hub name; raises as ``qtale.checkpoint.resolve`` does."""
    if model == DEMO:
        from qtale import demo

        return demo.model()
    return resolve(model)


def is_quantized(folder: Path) -> bool:
    """Whether the folder's config declares quantized weights."""
    return open_folder(folder).config.get("quantization_config") is not None


def spec_of(bits: int | None, group_size: int | str, symmetric: bool) -> QuantSpec | None:
    """The spec of an in-memory quantization, None without ``bits``; InputError for values that are not supported."""
    if bits is None:
        return None
    text = str(group_size)
    return QuantSpec(bits, int(text) if text.isdecimal() else text, symmetric)


def model_dtype(dtype: str, device: str) -> torch.dtype | str:
    """What transformers is told: "default" is float32 on a CPU and the stored type elsewhere."""
    import torch

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    if dtype == "default":
        dtype = "float32" if device.partition(":")[0] == "cpu" else "auto"
    return dtype if dtype == "auto" else getattr(torch, dtype)


def load_model(
    model: str | Path,
    spec: QuantSpec | None,
    compute: str,
    dtype: torch.dtype | str,
    device: str,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model in eval mode on ``device``.

    ``spec`` quantizes a dense model in memory; ``compute`` ("int8", "int16" or "float") is how quantized ones
    multiply.
    Raises InputError (a spec for a model that is quantized already, an unknown compute or device), CheckpointError,
    UnsupportedError, NetworkError.
    """
    if compute not in COMPUTE:
        raise InputError(
            f"compute {compute!r} is not known to PyTorch's layers; use 'int8', 'int16' or 'float', or the engine."
        )
    folder = model_folder(model)
    if not is_quantized(folder):
        # Scales take the stored type, so that the model equals the folder that `qtale quantize` writes.
        loaded = load_dense(folder, "auto" if spec else dtype, trust_remote_code)
        if spec is not None:
            from qtale.integrations.transformers import quantize_model_

            quantize_model_(loaded, spec, compute=compute)
            loaded = loaded if isinstance(dtype, str) else loaded.to(dtype)
    elif spec is None:
        loaded = _load_quantized(folder, compute, dtype)
    else:
        raise InputError(
            f"{model}: is quantized already, so bits cannot be chosen; leave them out, or give the dense model."
        )
    return _moved(loaded, device)


def load_dense(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a dense folder, as transformers loads it."""
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        ).eval()
    except _LOADER_ERRORS as error:
        raise UnsupportedError(
            f"{folder}: transformers cannot load it as a causal language model: {_first_line(error)}"
        ) from error


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; CheckpointError where transformers finds none."""
    import transformers

    folder = model_folder(model)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _LOADER_ERRORS as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load a tokenizer from it: {_first_line(error)}"
        ) from error


def _moved(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on ``device``; InputError where torch knows or has no such device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {_first_line(error)}") from error


def _load_quantized(folder: Path, compute: str, dtype: torch.dtype | str) -> Any:
    import qtale

    return qtale.load_torch(folder, compute=compute, dtype=None if dtype == "auto" else dtype)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
