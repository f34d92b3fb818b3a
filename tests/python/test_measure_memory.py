"""Peak memory of a measurement: one layer, a matrix of tokens and the hidden states, however deep the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtale.importance import DEFAULT_METRICS

HIDDEN, INNER, VOCAB = 256, 4096, 2048
LAYER_BYTES = 4 * (3 * HIDDEN * INNER + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 2 * HIDDEN)
MIB = 1 << 20
CHILD = """
import sys
import numpy as np, torch
from qtale import MeasureOptions
from qtale.importance import measure_tokens

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
sequences, max_memory = int(sys.argv[1]), int(sys.argv[2])
tokens = np.random.default_rng(0).integers(0, %d, (sequences, 64))
options = MeasureOptions(metrics=sys.argv[3].split(","), top_k=16)
measure_tokens(sys.argv[4], tokens[:1, :2], options, progress=False)  # loads what code and caches take
before = peak()
for model in sys.argv[5:]:
    measure_tokens(model, tokens, options, max_memory=max_memory, progress=False)
    print(peak() - before)
"""


def save_deep(path: Path, layers: int, hidden: int = HIDDEN, inner: int = INNER, vocab: int = VOCAB) -> Path:
    path.mkdir()
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "vocab_size": vocab},
        **{"num_hidden_layers": layers, "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"tie_word_embeddings": True, "max_position_embeddings": 64},
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"self_attn.k_proj": (hidden // 4, hidden), "self_attn.v_proj": (hidden // 4, hidden)}
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def growth(small: Path, *models: Path, sequences: int, max_memory: int, metrics: str) -> list[int]:
    """Bytes by which measurements raise the peak resident memory of a process that did a tiny one before."""
    arguments = [str(sequences), str(max_memory), metrics, str(small), *map(str, models)]
    command = [sys.executable, "-c", CHILD % VOCAB, *arguments]
    # What is freed goes back at once, as blocks over 32 MiB always do; holes that glibc keeps took up to 3 layers more.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB >> 4)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep(tmp_path_factory.mktemp("small") / "model", 1, 64, 64)


def test_memory_is_that_of_one_layer_and_flat_in_depth(small: Path, tmp_path: Path) -> None:
    models = [save_deep(tmp_path / str(layers), layers) for layers in (3, 16)]
    metrics = ",".join(DEFAULT_METRICS)
    shallow, deep = growth(small, *models, sequences=4, max_memory=1 << 30, metrics=metrics)
    # The layer, its gradient and squares, activations, a matrix being rounded; the whole model has 16 layers.
    assert LAYER_BYTES < shallow < 5 * LAYER_BYTES
    assert deep - shallow < LAYER_BYTES


def test_large_hidden_states_go_to_files(small: Path, tmp_path: Path) -> None:
    model = save_deep(tmp_path / "thin", 2, inner=64)
    sequences = 1536
    states = 2 * sequences * 64 * HIDDEN * 4  # before and after a layer
    (found,) = growth(small, model, sequences=sequences, max_memory=4 * MIB, metrics="bi")
    assert found < states / 2
