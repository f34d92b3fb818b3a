"""Turns a GGUF file of the Llama family into an ordinary HuggingFace folder."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint import output_folder
from qtale.errors import CheckpointError, Error, InputError, UnsupportedError
from qtale.integrations.gguf_header import GgufHeader, read_header
from qtale.integrations.gguf_llama import check, head_dim, rope_scaling

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("qtale")

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
_FILE_NAME = "model.gguf"
_LOADER_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, struct.error)


@dataclass(frozen=True)
class GgufReport:
    """What a GGUF file holds and what importing it writes; sizes in bytes."""

    file: str
    architecture: str
    name: str
    layers: int
    hidden_size: int
    vocabulary: int
    parameters: int
    tensor_types: dict[str, int]
    bytes_in: int
    bytes_out: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(file: str | Path, *, dtype: str = "float16") -> GgufReport:
    """Read and check a GGUF file's header only; raises what ``import_gguf`` raises before it loads anything."""
    return _report(_checked(file, dtype), dtype)


def import_gguf(file: str | Path, out: str | Path, *, dtype: str = "float16", progress: bool = True) -> Path:
    """Write the model of a GGUF file as a HuggingFace folder: config, safetensors, tokenizer, generation config.

    ``dtype`` is that of the written weights: "float16", "bfloat16" or "float32". transformers' own GGUF loader reads
    and dequantizes the weights and builds the tokenizer, so the folder holds what that loader gives, rounded to
    ``dtype``: weights that were stored in 4 bits stay as coarse as 4 bits. Where the loader does not know how a
    vocabulary splits text (SmolLM's isolated digits), the tokenizer differs from the original model's on such text.

    Architectures: llama (also files of Mistral, SmolLM, TinyLlama), qwen2, qwen3. Returns ``out``. Raises InputError
    (no such file, ``out`` exists, unknown dtype, values beyond float16), CheckpointError (broken or hostile file),
    UnsupportedError (another architecture or feature), Error (disk full). Nothing is left behind on an error.
    """
    header = _checked(file, dtype)
    out = Path(out).expanduser()
    with output_folder(out, _report(header, dtype).bytes_out) as target:
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            _write(header, target, dtype)
        _sync(target)
    return out


def _checked(file: str | Path, dtype: str) -> GgufHeader:
    if dtype not in DTYPES:
        raise InputError(f"import-gguf: dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    header = read_header(file)
    check(header)
    return header


def _report(header: GgufHeader, dtype: str) -> GgufReport:
    parameters = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    return GgufReport(
        file=str(header.path),
        architecture=header.architecture,
        name=str(header.values.get("general.name", header.path.stem)),
        layers=header.number("block_count"),
        hidden_size=header.number("embedding_length"),
        vocabulary=header.tensors["token_embd.weight"].shape[0],
        parameters=parameters,
        tensor_types=dict(Counter(tensor.type for tensor in header.tensors.values())),
        bytes_in=header.path.stat().st_size,
        bytes_out=parameters * DTYPES[dtype],
        dtype=dtype,
    )


def _write(header: GgufHeader, target: Path, dtype: str) -> None:
    from safetensors import SafetensorError

    with _alone(header.path) as folder:
        logger.info("import-gguf: reading the weights of %s", header.path.name)
        model = _load(header, folder, dtype)
        logger.info("import-gguf: building the tokenizer")
        tokenizer = _load_tokenizer(header, folder)
    logger.info("import-gguf: writing")
    try:
        model.save_pretrained(target, max_shard_size="5GB")
    except SafetensorError as error:  # a full disk, for instance, is no OSError there
        raise Error(f"import-gguf: the weights cannot be written ({error}); nothing was kept.") from error
    tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[str]:
    """A folder that holds the file and nothing else, so that no config or tokenizer beside it is picked up."""
    with tempfile.TemporaryDirectory(prefix="qtale-gguf-") as folder:
        (Path(folder) / _FILE_NAME).symlink_to(file.resolve())
        yield folder


@contextlib.contextmanager
def _loading(header: GgufHeader, what: str) -> Iterator[None]:
    try:
        yield
    except Error:
        raise
    except NotImplementedError as error:
        raise UnsupportedError(f"{header.path}: transformers cannot read the {what}: {error}") from error
    except _LOADER_ERRORS as error:
        raise CheckpointError(f"{header.path}: transformers cannot read the {what}: {error!r}") from error


def _load(header: GgufHeader, folder: str, dtype: str) -> Any:
    import torch
    import transformers

    with _loading(header, "model"):
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=_FILE_NAME)
        # Both are left out by the loader: qwen3's head size, and Llama 3.1's rope scaling.
        config.head_dim = head_dim(header)
        config.rope_parameters = rope_scaling(header, config.rope_parameters["rope_theta"]) or config.rope_parameters
        options: dict[str, Any] = {"gguf_file": _FILE_NAME, "config": config, "dtype": getattr(torch, dtype)}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        _check_finite(header, loaded.state_dict(), dtype)
        return _plain(loaded)


def _plain(loaded: Any) -> Any:
    """The same model without the traces of its loading, which refuses to be saved: no copy of the weights."""
    import torch

    config = loaded.config
    for trace in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, trace):
            delattr(config, trace)
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


def _check_finite(header: GgufHeader, state: dict[str, torch.Tensor], dtype: str) -> None:
    for name, tensor in state.items():
        if tensor.isnan().any():
            raise CheckpointError(f"{header.path}: the tensor {name!r} holds NaN.")
        if tensor.isinf().any():
            raise InputError(
                f"{header.path}: the tensor {name!r} holds values that {dtype} cannot; import with --dtype bfloat16 or "
                "float32, and if that fails too the file itself holds infinities."
            )


def _load_tokenizer(header: GgufHeader, folder: str) -> Any:
    import transformers

    with _loading(header, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_FILE_NAME)
        tokenizer.model_max_length = header.number("context_length")
        return tokenizer


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
