"""Peak memory of a measurement: the embedding, one layer and the hidden states, however deep the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB = 256, 4096, 2048
LAYER_BYTES = 4 * (3 * HIDDEN * INNER + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 2 * HIDDEN)
MIB = 1 << 20
CHILD = """
import sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from qtale import MeasureOptions
from qtale.importance import DEFAULT_METRICS, measure_tokens
from qtale.importance.layered import LayeredModel

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
tokens = np.random.default_rng(0).integers(0, {vocab}, ({sequences}, 64))
options = MeasureOptions(metrics={metrics}, top_k=16, loss_sequences=2)
measure_tokens(sys.argv[1], tokens[:1, :2], options, progress=False)  # loads what code and caches take
before = peak()
measure_tokens(sys.argv[2], tokens, options, max_memory={max_memory}, progress=False)
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


def growth(
    small: Path, model: Path, sequences: int = 4, max_memory: int = 1 << 30, metrics: str = "DEFAULT_METRICS"
) -> int:
    """Bytes by which a measurement raises the peak resident memory of a process that did a tiny one before."""
    code = CHILD.format(vocab=VOCAB, sequences=sequences, max_memory=max_memory, metrics=metrics)
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep(tmp_path_factory.mktemp("small") / "model", 1, 64, 64)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep(tmp_path_factory.mktemp("deep") / "model", 16)


def test_memory_is_that_of_one_layer_and_flat_in_depth(small: Path, deep: Path, tmp_path: Path) -> None:
    shallow = growth(small, save_deep(tmp_path / "shallow", 3))
    found = growth(small, deep)
    # The layer, activations, pieces of the layer while its error is measured; the whole model has 16 layers.
    assert LAYER_BYTES < found < 6.5 * LAYER_BYTES
    assert abs(found - shallow) < 2.5 * LAYER_BYTES


def test_large_hidden_states_go_to_files(small: Path, tmp_path: Path) -> None:
    model = save_deep(tmp_path / "thin", 2, inner=64)
    sequences = 1536
    states = 2 * sequences * 64 * HIDDEN * 4  # before and after a layer
    assert growth(small, model, sequences, 4 * MIB, '("bi",)') < states / 2
