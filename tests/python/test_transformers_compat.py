"""Folders that qtale wrote open in plain transformers, which decompresses them with compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

import qtale
from pack_quantized_oracle import read_packed
from qtale import QuantSpec

pytest.importorskip("compressed_tensors", reason="transformers needs compressed-tensors to open packed folders")

# 192 is no multiple of 128: automatic groups differ between layers.
CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
W8 = QuantSpec(8, "channel")
MIXED = {
    "model.layers.0.mlp.down_proj": W8,
    "model.layers.1.mlp.down_proj": QuantSpec(3, 64),
    "model.layers.0.self_attn.o_proj": None,
    **{f"model.layers.1.self_attn.{part}_proj": QuantSpec(2, 32) for part in "qkv"},
    **{f"model.layers.0.mlp.{part}_proj": W8 for part in ("gate", "up")},
}
INPUT_IDS = torch.arange(1, 17).reshape(1, 16)


@pytest.fixture
def dense(tmp_path: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(7)
    LlamaForCausalLM(CONFIG).to(dtype).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def with_oracle_weights(dense: Path, folder: Path) -> LlamaForCausalLM:
    """The dense model whose quantized matrices are those that the independent reader finds in ``folder``."""
    model = LlamaForCausalLM.from_pretrained(dense, dtype="auto").eval()
    with torch.no_grad():
        for module, matrix in read_packed(folder).items():
            weight = torch.tensor(matrix.dequantized())
            assert not torch.equal(weight.to(model.dtype), model.get_submodule(module).weight), module
            model.get_submodule(module).weight.copy_(weight)
    return model


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(INPUT_IDS).logits
    return logits


def assert_opens_with_equal_logits(folder: Path, dense: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = with_oracle_weights(dense, folder)
    logits = logits_of(model.eval())
    assert logits.dtype == expected.dtype
    for module in read_packed(folder):
        weight = model.get_submodule(module).weight
        assert torch.equal(weight, expected.get_submodule(module).weight), module
    torch.testing.assert_close(logits, logits_of(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(3, "channel"), QuantSpec(4), QuantSpec(4, "channel"), W8],
    ids=lambda spec: f"w{spec.num_bits}-{spec.group_size}",
)
def test_uniform_symmetric_folder(dense: Path, tmp_path: Path, spec: QuantSpec) -> None:
    qtale.quantize(dense, tmp_path / "out", spec, progress=False)
    assert_opens_with_equal_logits(tmp_path / "out", dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_bits_groups_and_dense_layers(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qtale.quantize(dense, out, QuantSpec(4), overrides=MIXED, progress=False)
    packed = read_packed(out)
    assert {matrix.num_bits for matrix in packed.values()} == {2, 3, 4, 8}
    assert "model.layers.0.self_attn.o_proj" not in packed
    assert_opens_with_equal_logits(out, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_asymmetric_folder_opens_dequantized(dense: Path, tmp_path: Path) -> None:
    qtale.quantize(dense, tmp_path / "out", QuantSpec(4, 64, symmetric=False), progress=False)
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", quantization_config=config)
    torch.testing.assert_close(logits_of(model.eval()), logits_of(with_oracle_weights(dense, tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_asymmetric_folder_opens_packed_or_is_refused(dense: Path, tmp_path: Path) -> None:
    qtale.quantize(dense, tmp_path / "out", QuantSpec(4, 64, symmetric=False), progress=False)
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} refuses packed zero points")
    torch.testing.assert_close(logits_of(model.eval()), logits_of(with_oracle_weights(dense, tmp_path / "out")))
