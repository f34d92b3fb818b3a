"""What a decoder of the Llama family is, read from config.json: data for the engine, one class for all models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtale.engine.rope import Rope, read_rope
from qtale.engine.values import Values
from qtale.errors import CheckpointError, UnsupportedError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 1 << 14
MAX_HEAD_DIM = 1 << 12
# What transformers' config classes take where a field is missing.
_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_WINDOW = 4096
_FIRST_WINDOW_LAYER = 28
# Fields of other models that change what is computed, with the values that change nothing.
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "attention_sinks": (None, False, 0),
    "add_attention_sinks": (None, False),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
}


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and features of a decoder.

    ``positions`` is max_position_embeddings; ``windows`` has for each layer the tokens that a token sees, itself
    included, 0 for all. Biases are those of q/k/v, of o, and of gate/up/down.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    positions: int
    norm_eps: float
    rope: Rope
    windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool

    @property
    def query_width(self) -> int:
        """Outputs of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Outputs of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim


def read_spec(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """The decoder that a config.json describes; ``where`` names its folder in errors.

    Raises UnsupportedError for what the engine does not run, naming it, and CheckpointError for values that are missing
    or make no sense.
    """
    values = Values(config, where)
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedError(
            f"{where}: has the model_type {kind!r}; the engine runs {', '.join(MODEL_TYPES)}. Use qtale.load_torch "
            "for other models."
        )
    _check_features(values)
    hidden, layers = values.count("hidden_size"), values.count("num_hidden_layers", most=MAX_LAYERS)
    heads = values.count("num_attention_heads")
    kv_heads = _kv_heads(values, kind, heads)
    head_dim = _head_dim(values, kind, hidden, heads)
    positions = values.count("max_position_embeddings", _POSITIONS[kind])
    attention_bias = kind in ("llama", "qwen3") and values.flag("attention_bias")
    return DecoderSpec(
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=values.count("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=values.count("vocab_size"),
        positions=positions,
        norm_eps=values.number("rms_norm_eps", 1e-6),
        rope=read_rope(values, head_dim, positions),
        windows=_windows(values, kind, layers),
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and values.flag("mlp_bias"),
        qk_norm=kind == "qwen3",
        tied=values.flag("tie_word_embeddings"),
    )


def _check_features(values: Values) -> None:
    act = values.get("hidden_act")
    if act not in (None, "silu", "swish"):
        raise values.unsupported(f"has the activation {act!r} (hidden_act; known is 'silu')")
    for key, neutral in _FOREIGN.items():
        if values.get(key) not in neutral:
            raise values.unsupported(f"has {key} {values.get(key)!r}")


def _kv_heads(values: Values, kind: str, heads: int) -> int:
    default = heads if "num_key_value_heads" in values.fields else _KV_HEADS.get(kind, heads)
    kv_heads = values.count("num_key_value_heads", default)
    if heads % kv_heads:
        raise CheckpointError(
            f"{values.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}."
        )
    return kv_heads


def _head_dim(values: Values, kind: str, hidden: int, heads: int) -> int:
    missing = "head_dim" not in values.fields
    head_dim = values.count("head_dim", 128 if kind == "qwen3" and missing else max(1, hidden // heads))
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{values.where}: head_dim is {head_dim}; rotary positions need an even one of at most {MAX_HEAD_DIM}."
        )
    return head_dim


def _windows(values: Values, kind: str, layers: int) -> tuple[int, ...]:
    types = values.get("layer_types")
    if kind == "llama":
        return (0,) * layers
    if kind == "mistral":
        if types is not None and len(set(map(str, types if isinstance(types, list) else [types]))) > 1:
            raise values.unsupported("mixes kinds of attention (layer_types) in a mistral model")
        null = "sliding_window" in values.fields and values.get("sliding_window") is None
        return (0 if null else values.count("sliding_window", _WINDOW),) * layers
    window = 0
    if values.flag("use_sliding_window") and values.fields.get("sliding_window", _WINDOW) is not None:
        window = values.count("sliding_window", _WINDOW)
    if types is None:
        first = values.get("max_window_layers")
        first = _FIRST_WINDOW_LAYER if first is None else first
        if type(first) is not int:
            raise CheckpointError(f"{values.where}: max_window_layers is {first!r}; it must be an integer.")
        return tuple(window if layer >= first else 0 for layer in range(layers))
    return _windows_by_type(values, types, layers, window)


def _windows_by_type(values: Values, types: Any, layers: int, window: int) -> tuple[int, ...]:
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"{values.where}: layer_types must be a list of {layers} kinds, one for each layer.")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise values.unsupported(f"has layers of the kind {name!r} (layer_types)")
    if "sliding_attention" in types and not window:
        raise CheckpointError(
            f"{values.where}: layer_types asks for windows, but use_sliding_window and sliding_window give none."
        )
    return tuple(window if name == "sliding_attention" else 0 for name in types)
