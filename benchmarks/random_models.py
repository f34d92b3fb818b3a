"""Model folders with random weights, in the form `qtale quantize` writes, made in seconds: speed needs no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtale.checkpoint.writer import ShardWriter, TensorShape
from qtale.format.config import build_config
from qtale.format.tensors import PACKED, SCALE, SHAPE, packed_layout
from qtale.routing.files import write_routing
from qtale.routing.routing import RouterWeights, Routing
from qtale.spec import QuantSpec, ResolvedSpec

STD = 0.02  # of weights: layers then add to the residual stream about as much as it holds
POOL = 16 << 20  # random bytes, which tensors take again and again


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int = 2048
    between: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    positions: int = 8192

    def config(self) -> dict[str, object]:
        """Fields of config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.between,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Modules of the layers: name, [out, in]."""
        kv = self.hidden // self.heads * self.kv_heads
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for part, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                yield f"{at}.self_attn.{part}_proj", (rows, self.hidden)
            for part in ("gate", "up"):
                yield f"{at}.mlp.{part}_proj", (self.between, self.hidden)
            yield f"{at}.mlp.down_proj", (self.hidden, self.between)

    def norms(self) -> list[str]:
        """Names of the vectors of ones."""
        parts = ("input_layernorm", "post_attention_layernorm")
        return ["model.norm.weight", *(f"model.layers.{i}.{p}.weight" for i in range(self.layers) for p in parts)]


TINYLLAMA = Shape()
TINY = Shape(256, 512, 2, 4, 2, 320, 512)


class Pool:
    """Random bytes without end."""

    def __init__(self) -> None:
        self._bytes = np.frombuffer(np.random.default_rng(0).bytes(POOL), np.uint8)
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        """``count`` bytes."""
        self._at = (self._at + 4096) % (POOL // 2)
        return np.resize(self._bytes[self._at :], count)


def write_model(folder: Path, shape: Shape, spec: QuantSpec) -> Path:
    """A folder whose layers are quantized by ``spec``, symmetric, and whose head and embedding are float16."""
    folder.mkdir(parents=True)
    specs = {name: spec.resolve(name, size[1]) for name, size in shape.matrices()}
    config = {**shape.config(), "quantization_config": build_config(specs, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    dense = [TensorShape(name, "F16", (shape.vocab, shape.hidden)) for name in _DENSE]
    norms = [TensorShape(name, "F16", (shape.hidden,)) for name in shape.norms()]
    packed = {name: packed_layout(name, size, specs[name], "F16") for name, size in shape.matrices()}
    tensors = [*dense, *norms, *(tensor for parts in packed.values() for tensor in parts.values())]
    with ShardWriter(folder / "model.safetensors", tensors, {"format": "pt"}) as writer:
        _write_dense(writer, shape)
        pool = Pool()
        for name, size in shape.matrices():
            _write_packed(writer, name, size, specs[name], pool)
    return folder


def write_dense(folder: Path, shape: Shape) -> Path:
    """A float16 folder as transformers reads it, with a tokenizer whose words are t0, t1, …: for others' converters."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    words = {f"t{token}": token for token in range(shape.vocab)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    dense = [TensorShape(name, "F16", (shape.vocab, shape.hidden)) for name in _DENSE]
    norms = [TensorShape(name, "F16", (shape.hidden,)) for name in shape.norms()]
    layers = [TensorShape(f"{name}.weight", "F16", size) for name, size in shape.matrices()]
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * np.float32(STD)
    with ShardWriter(folder / "model.safetensors", [*dense, *norms, *layers], {"format": "pt"}) as writer:
        _write_dense(writer, shape)
        for number, tensor in enumerate(layers):
            writer.write(tensor.name, np.resize(pool[64 * number :], tensor.shape).astype(np.float16))
    return folder


_DENSE = ("model.embed_tokens.weight", "lm_head.weight")


def _write_dense(writer: ShardWriter, shape: Shape) -> None:
    generator = np.random.default_rng(1)
    for name, std in zip(_DENSE, (1.0, STD), strict=True):
        values = generator.standard_normal((shape.vocab, shape.hidden), dtype=np.float32)
        writer.write(name, (values * std).astype(np.float16))
    for name in shape.norms():
        writer.write(name, np.ones(shape.hidden, np.float16))


def _write_packed(writer: ShardWriter, name: str, size: tuple[int, int], spec: ResolvedSpec, pool: Pool) -> None:
    parts = packed_layout(name, size, spec, "F16")
    writer.write(f"{name}.{PACKED}", pool.take(parts[PACKED].nbytes).view(np.int32))
    spread = 2.0**spec.num_bits / 12**0.5
    writer.write(f"{name}.{SCALE}", np.full(parts[SCALE].shape, STD / spread, np.float16))
    writer.write(f"{name}.{SHAPE}", np.array(size, np.int64))


def routed_copy(folder: Path, model: Path, layers: int, hidden: int, width: int) -> Path:
    """A folder of links to a model with a random router of D-LLM's form, ``width`` wide, on every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    generator = np.random.default_rng(2)

    def random(*size: int) -> np.ndarray:
        return generator.standard_normal(size, dtype=np.float32) / np.float32(size[-1] ** 0.5)

    routers = {
        layer: RouterWeights(random(width, hidden), None, np.ones(width, np.float32), random(2, width) * 4)
        for layer in range(layers)
    }
    write_routing(folder, Routing(routers, 0.5, 0), layers, hidden)
    return folder
