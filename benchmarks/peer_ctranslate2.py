"""Runs where ctranslate2 is: `make FOLDER SIZES`, `prefill|decode|bytes FOLDER TOKENS THREADS REPEATS`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

from peer_script import Timed, run

POOL = 16 << 20


def make(folder: str, description: str) -> None:
    """A random int8 model of the given sizes, in JSON."""
    sizes = json.loads(description)
    hidden, between, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_layers"]
    query, kv = sizes["num_heads"] * sizes["head_dim"], sizes["num_kv_heads"] * sizes["head_dim"]
    generator = np.random.default_rng(0)
    pool = generator.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    made = 0

    def random(rows: int, cols: int) -> np.ndarray:
        nonlocal made
        made += 1
        # Other values each time: equal matrices would be stored once.
        return np.resize(pool[made * 64 :], (rows, cols))

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers,
        sizes["num_heads"],
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=10000,
        num_heads_kv=None if sizes["num_kv_heads"] == sizes["num_heads"] else sizes["num_kv_heads"],
        quant_type=common_spec.Quantization.CT2,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = random(sizes["vocab_size"], hidden)
    decoder.projection.weight = random(sizes["vocab_size"], hidden)
    ones = np.ones(hidden, np.float32)
    decoder.layer_norm.gamma = ones
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = ones
        layer.ffn.layer_norm.gamma = ones
        layer.self_attention.linear[0].weight = random(query + 2 * kv, hidden)
        layer.self_attention.linear[1].weight = random(hidden, query)
        layer.ffn.linear_0.weight = random(between, hidden)
        layer.ffn.linear_0_noact.weight = random(between, hidden)
        layer.ffn.linear_1.weight = random(hidden, between)
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<unk>", "<s>", "</s>"
    spec.config.layer_norm_epsilon = sizes["norm_eps"]
    spec.register_vocabulary(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, sizes["vocab_size"]))])
    spec.validate()
    spec.optimize(quantization="int8")
    partial = Path(folder + ".partial")
    partial.mkdir(parents=True)
    spec.save(str(partial))
    read = sum(linear_bytes(layer) for layer in (*decoder.layer, decoder.projection))
    (partial / "bytes").write_text(str(read))
    partial.rename(folder)


def linear_bytes(spec: object) -> int:
    """Bytes of the matrices under a part of the model."""
    total = 0
    for name, value in spec.variables().items():
        if name.rpartition("/")[2] in ("weight", "weight_scale") and not isinstance(value, str):
            total += value.numpy().nbytes
    return total


def bytes_of(folder: str) -> int:
    """Bytes of the matrices, the head's with them."""
    return int((Path(folder) / "bytes").read_text())


def timed(what: str, folder: str, tokens: int, threads: int) -> Timed:
    """Reading a prompt, or decoding so many tokens after one."""
    generator = ctranslate2.Generator(folder, device="cpu", compute_type="int8", intra_threads=threads)
    prompt = ["<s>", *(f"t{3 + i * 7 % 29000}" for i in range(tokens - 1))] if what == "prefill" else ["<s>"]
    new = 1 if what == "prefill" else tokens

    def seconds() -> float:
        start = time.perf_counter()
        generator.generate_batch(
            [prompt],
            min_length=new,
            max_length=new,
            include_prompt_in_result=False,
            beam_size=1,
            cache_static_prompt=False,
        )
        return time.perf_counter() - start

    return seconds


if __name__ == "__main__":
    run(make, bytes_of, timed)
