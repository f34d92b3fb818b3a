"""The shape of a model: what its parts weigh, from the headers of its folder or from config.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtale import names
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import ITEM_BYTES, STORED_FLOATS, TensorInfo
from qtale.checkpoint.writer import TensorShape
from qtale.errors import CheckpointError, UnsupportedError
from qtale.format.tensors import SCALE_DTYPES

# Models whose tensors follow from config.json by the rules of _tensors_of.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
_STORED = {name: stored for stored, name in STORED_FLOATS.items()}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LinearShape:
    """One Linear: its full name, [out_features, in_features] and its stored dtype, as safetensors spells it."""

    name: str
    out_features: int
    in_features: int
    dtype: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as it is stored."""
        return self.weights * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a model.

    ``linears`` are those of the decoder blocks, in model order; ``head`` is None where it shares the embedding's
    memory. ``kv_width`` counts the numbers that one token leaves in the KV cache of one layer.
    """

    model_type: str
    num_layers: int
    linears: tuple[LinearShape, ...]
    head: LinearShape | None
    embedding_bytes: int
    other_bytes: int
    dtype: str
    kv_width: int
    attention_width: int
    intermediate_width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Number of weights in the Linears of the decoder blocks."""
        return sum(linear.weights for linear in self.linears)


def shape_of_folder(folder: ModelFolder) -> ModelShape:
    """The shape of a dense model folder, from config.json and safetensors headers.

    Raises UnsupportedError for quantized folders and for models without Linears or sizes that qtale knows by name.
    """
    if folder.config.get("quantization_config") is not None:
        raise UnsupportedError(f"{folder.path}: is quantized already; plan from the dense model.")
    return _shape(folder.tensors.values(), folder.config, str(folder.path))


def shape_of_config(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape of a Llama-family model from its config alone.

    Raises UnsupportedError for other families and CheckpointError where a size is missing.
    """
    if config.get("model_type") not in LLAMA_FAMILY:
        raise UnsupportedError(
            f"{where}: the tensors of model_type {config.get('model_type')!r} do not follow from its config; known are "
            f"{', '.join(LLAMA_FAMILY)}. Give the folder with its weights."
        )
    return _shape(list(_tensors_of(config, where)), config, where)


def _shape(tensors: Iterable[TensorInfo | TensorShape], config: Mapping[str, Any], where: str) -> ModelShape:
    linears: list[LinearShape] = []
    head: LinearShape | None = None
    embedding = other = vocabulary = 0
    dtype = ""
    for info in sorted(tensors, key=lambda info: names.model_order(info.name)):
        role = names.role(info.name, info.shape)
        if role == names.LINEAR:
            if info.dtype not in SCALE_DTYPES:
                raise UnsupportedError(
                    f"{where}: {info.name} has dtype {info.dtype}; a plan takes {', '.join(SCALE_DTYPES)}."
                )
            linears.append(LinearShape(names.module_of(info.name), info.shape[0], info.shape[1], info.dtype))
        elif role == names.HEAD and names.module_of(info.name) == "lm_head":
            if config.get("tie_word_embeddings") is not True:
                head = LinearShape("lm_head", info.shape[0], info.shape[1], info.dtype)
        elif role == names.EMBEDDING:
            embedding, vocabulary, dtype = embedding + info.nbytes, max(vocabulary, info.shape[0]), info.dtype
        else:
            other += info.nbytes
    if not linears or not embedding:
        raise UnsupportedError(
            f"{where}: has no embedding or no Linear weights in numbered decoder blocks that qtale knows by name "
            f"(model_type {config.get('model_type')!r}); the Llama family is what it is made for."
        )
    blocks = {names.block_index(f"{linear.name}.") for linear in linears}
    heads, hidden = _size(config, where, "num_attention_heads", "n_head"), _size(config, where, "hidden_size", "n_embd")
    head_dim = _size(config, where, "head_dim", default=max(1, hidden // heads))
    return ModelShape(
        model_type=str(config.get("model_type")),
        num_layers=len(blocks),
        linears=tuple(linears),
        head=head,
        embedding_bytes=embedding,
        other_bytes=other,
        dtype=dtype,
        kv_width=2 * head_dim * _size(config, where, "num_key_value_heads", default=heads),
        attention_width=max(hidden, heads * head_dim),
        intermediate_width=max(linear.in_features for linear in linears),
        vocabulary=vocabulary,
    )


def _tensors_of(config: Mapping[str, Any], where: str) -> Iterator[TensorShape]:
    hidden, between = _size(config, where, "hidden_size"), _size(config, where, "intermediate_size")
    vocabulary, heads = _size(config, where, "vocab_size"), _size(config, where, "num_attention_heads")
    head_dim = _size(config, where, "head_dim", default=max(1, hidden // heads))
    keys = head_dim * _size(config, where, "num_key_value_heads", default=heads)
    dtype = _STORED.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
    shapes = {"q_proj": (heads * head_dim, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    shapes["o_proj"] = (hidden, heads * head_dim)
    biased = {"qwen2": _ATTENTION[:3]}.get(config["model_type"], _ATTENTION if config.get("attention_bias") else ())
    matrices = {f"self_attn.{part}": shapes[part] for part in _ATTENTION}
    matrices |= {"mlp.gate_proj": (between, hidden), "mlp.up_proj": (between, hidden)}
    matrices["mlp.down_proj"] = (hidden, between)
    yield TensorShape("model.embed_tokens.weight", dtype, (vocabulary, hidden))
    for layer in range(_size(config, where, "num_hidden_layers")):
        block = f"model.layers.{layer}"
        for part, shape in matrices.items():
            yield TensorShape(f"{block}.{part}.weight", dtype, shape)
        for part in biased:
            yield TensorShape(f"{block}.self_attn.{part}.bias", dtype, shapes[part][:1])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorShape(f"{block}.{norm}.weight", dtype, (hidden,))
        for norm in ("q_norm", "k_norm") if config["model_type"] == "qwen3" else ():
            yield TensorShape(f"{block}.self_attn.{norm}.weight", dtype, (head_dim,))
    yield TensorShape("model.norm.weight", dtype, (hidden,))
    if config.get("tie_word_embeddings") is not True:
        yield TensorShape("lm_head.weight", dtype, (vocabulary, hidden))


def _size(config: Mapping[str, Any], where: str, *keys: str, default: int | None = None) -> int:
    """The first of ``keys`` that is there; ``default`` where all are absent or null."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {keys[0]} is {value!r}; it must be a positive integer.")
    return value
