"""Folders that llm-compressor wrote: the layout is what the oracle says, and qtale reads the same weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import qtale
from pack_quantized_oracle import Packed, Tensor, read_packed, read_safetensors, scheme_of, stored_bytes
from qtale import ops
from qtale.checkpoint.folder import open_folder
from qtale.format import packed_modules, packed_tensors, read_module

SAMPLES = Path(__file__).parent / "samples" / "llmcompressor"
NAMES = sorted(path.name for path in SAMPLES.iterdir() if path.is_dir())
DTYPES = {"F16": "float16", "BF16": "bfloat16"}
ZERO_ROW = "model.layers.0.self_attn.k_proj"
EPSILON = {"F16": 2.0**-10, "BF16": 2.0**-7}


def expected_weights(name: str) -> dict[str, Any]:
    weights: dict[str, Any] = json.loads((SAMPLES / f"{name}.weights.json").read_text())["weights"]
    return weights


def words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)


def test_the_samples_cover_what_is_promised() -> None:
    kinds = {
        (packed.num_bits, packed.zero_point is None, packed.scale.values.shape[1] > 1)
        for name in NAMES
        for packed in read_packed(SAMPLES / name).values()
    }
    assert {(4, True, True), (4, False, True), (3, True, True), (8, True, False), (3, False, False)} <= kinds


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_reproduces_every_weight_bit_for_bit(name: str) -> None:
    packed, expected = read_packed(SAMPLES / name), expected_weights(name)
    assert packed.keys() == expected.keys()
    for module, matrix in packed.items():
        assert DTYPES[matrix.scale.dtype] == expected[module]["dtype"], module
        assert list(matrix.codes.shape) == expected[module]["shape"], module
        raw = stored_bytes(matrix.dequantized(), matrix.scale.dtype)
        assert hashlib.sha256(raw).hexdigest() == expected[module]["sha256"], module


@pytest.mark.parametrize("name", NAMES)
def test_stored_shapes_and_types(name: str) -> None:
    config = json.loads((SAMPLES / name / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    tensors = read_safetensors(SAMPLES / name / "model.safetensors")
    for module, entry in expected_weights(name).items():
        rows, columns = entry["shape"]
        scheme = scheme_of(module, config)
        groups = columns // scheme["group_size"] if scheme["strategy"] == "group" else 1
        bits = scheme["num_bits"]
        stored = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{module}.weight")}
        shapes = {key: (tensor.dtype, tensor.values.shape) for key, tensor in stored.items()}
        float_type = {v: k for k, v in DTYPES.items()}[entry["dtype"]]
        wanted = {
            "weight_packed": ("I32", (rows, words(columns, bits))),
            "weight_scale": (float_type, (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not scheme["symmetric"]:
            wanted["weight_zero_point"] = ("I32", (words(rows, bits), groups))
        assert shapes == wanted, module
        assert stored["weight_shape"].values.tolist() == [rows, columns]


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_row_has_the_types_epsilon_as_scale(name: str) -> None:
    matrix = read_packed(SAMPLES / name)[ZERO_ROW]
    assert set(matrix.scale.float32()[3].tolist()) == {EPSILON[matrix.scale.dtype]}
    assert not matrix.dequantized()[3].any()


def unrounded(matrix: Packed) -> np.ndarray:
    """(code - zero point) * scale in float32, not rounded to the scale's type."""
    groups = matrix.scale.values.shape[1]
    blocks = matrix.codes.reshape(len(matrix.codes), groups, -1).astype(np.float32)
    offset = 0 if matrix.zero_point is None else matrix.zero_point[:, :, None]
    product = (blocks - offset).astype(np.float32) * matrix.scale.float32()[:, :, None]
    return product.reshape(matrix.codes.shape)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits_are_those_of_the_oracles_weights(name: str) -> None:
    config = json.loads((SAMPLES / name / "config.json").read_text())
    config.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    stored = read_safetensors(SAMPLES / name / "model.safetensors")
    state = {key: torch.tensor(stored[key].float32()) for key in model.state_dict() if key in stored}
    for module, matrix in read_packed(SAMPLES / name).items():
        state[f"{module}.weight"] = torch.tensor(unrounded(matrix))
    model.load_state_dict(state)
    recorded = load_file(SAMPLES / f"{name}.logits.safetensors")
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    torch.testing.assert_close(logits, recorded["logits"], rtol=0, atol=2e-5)


def torch_values(tensor: Tensor) -> torch.Tensor:
    return torch.tensor(tensor.float32()).to(getattr(torch, DTYPES[tensor.dtype]))


@pytest.mark.parametrize("name", NAMES)
def test_ops_unpack_and_dequantize_like_the_oracle(name: str) -> None:
    stored = read_safetensors(SAMPLES / name / "model.safetensors")
    for module, matrix in read_packed(SAMPLES / name).items():
        rows, columns = matrix.codes.shape
        codes = ops.unpack(stored[f"{module}.weight_packed"].values, matrix.num_bits, columns)
        np.testing.assert_array_equal(codes, matrix.codes, err_msg=module)
        np.testing.assert_array_equal(ops.pack(codes, matrix.num_bits), stored[f"{module}.weight_packed"].values)
        zero_point = None
        if matrix.zero_point is not None:
            words = np.ascontiguousarray(stored[f"{module}.weight_zero_point"].values.T)
            zero_point = torch.from_numpy(np.ascontiguousarray(ops.unpack(words, matrix.num_bits, rows).T))
        weight = ops.dequantize(torch.from_numpy(codes), torch_values(matrix.scale), zero_point)
        np.testing.assert_array_equal(weight.float().numpy(), matrix.dequantized(), err_msg=module)


@pytest.mark.parametrize("name", NAMES)
def test_qtale_reads_the_folder_with_equal_weights(name: str) -> None:
    folder = open_folder(SAMPLES / name)
    modules, oracle = packed_modules(folder), read_packed(SAMPLES / name)
    assert modules.keys() == oracle.keys()
    for module, matrix in oracle.items():
        codes, scale, zero_point = read_module(folder, modules[module])
        assert modules[module].spec.num_bits == matrix.num_bits
        assert (zero_point is None) == (matrix.zero_point is None)
        weight = ops.dequantize(codes, scale, zero_point)
        assert str(weight.dtype) == f"torch.{DTYPES[matrix.scale.dtype]}"
        np.testing.assert_array_equal(weight.float().numpy(), matrix.dequantized(), err_msg=module)


@pytest.mark.parametrize("name", NAMES)
def test_qtale_stores_the_same_tensors_again(name: str) -> None:
    folder = open_folder(SAMPLES / name)
    for module, found in packed_modules(folder).items():
        tensors = packed_tensors(module, *read_module(folder, found), found.spec.num_bits)
        for key, value in tensors.items():
            assert torch.equal(torch.as_tensor(value), folder.torch(key)), key


@pytest.mark.parametrize("name", NAMES)
def test_load_torch_gives_the_recorded_logits(name: str) -> None:
    recorded = load_file(SAMPLES / f"{name}.logits.safetensors")
    model = qtale.load_torch(SAMPLES / name, compute="float", dtype=torch.float32)
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    spread = float(recorded["logits"].max() - recorded["logits"].min())
    assert float((logits - recorded["logits"]).abs().max()) < 1e-5 * spread


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gives_the_recorded_logits(name: str) -> None:
    recorded = load_file(SAMPLES / f"{name}.logits.safetensors")
    model = qtale.load_torch(SAMPLES / name, compute="float", dtype=torch.float32)
    with torch.no_grad():
        beside = model(recorded["input_ids"]).logits.numpy()
    expected = recorded["logits"].numpy()
    spread = float(np.ptp(expected))
    with qtale.load(SAMPLES / name, compute="float", kv_dtype="float32", progress=False) as engine:
        for ids, row, other in zip(recorded["input_ids"].tolist(), expected, beside, strict=True):
            found = engine.logits(ids)
            assert float(np.abs(found - row).max()) < 1e-5 * spread
            assert float(np.abs(found - other).max()) < 1e-5 * spread
    # Activations of 8 bits, one block deep.
    with qtale.load(SAMPLES / name, compute="int8", kv_dtype="float32", progress=False) as engine:
        for ids, row in zip(recorded["input_ids"].tolist(), expected, strict=True):
            assert 0 < float(np.abs(engine.logits(ids) - row).max()) < 0.05 * spread
