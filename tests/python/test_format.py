"""`pack-quantized` folders: what the config may say, which spec a module gets, and tensors against an own oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pack_quantized_oracle import unpack
from qtale.checkpoint import open_folder
from qtale.errors import CheckpointError, UnsupportedError
from qtale.format import build_config, packed_layout, packed_modules, packed_tensors, parse_config, read_module
from qtale.spec import ResolvedSpec

W4 = ResolvedSpec(4, 64, True)
W8 = ResolvedSpec(8, 0, False)
MODULE = "model.layers.0.mlp.up_proj"


def declared(config: dict[str, Any]) -> dict[str, Any]:
    return {"quantization_config": config}


def with_weights(**changes: Any) -> dict[str, Any]:
    config = build_config({MODULE: W4}, [])
    config["config_groups"]["group_0"]["weights"].update(changes)
    return declared(config)


def test_a_config_reads_back_as_it_was_written() -> None:
    specs = {"a.0.q_proj": W4, "a.0.o_proj": W8, "a.1.q_proj": W4, "a.1.o_proj": ResolvedSpec(3, 128, True)}
    written = build_config(specs, ["lm_head"])
    assert [len(group["targets"]) for group in written["config_groups"].values()] == [2, 1, 1]
    read = parse_config(declared(json.loads(json.dumps(written))), "here")
    assert read is not None
    assert {name: read.spec_of(name) for name in specs} == specs
    assert read.spec_of("lm_head") is None
    assert read.spec_of("a.2.q_proj") is None


def test_compressed_tensors_validates_the_config() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="the format's own package")
    config = build_config({MODULE: W4, "x": W8, "y": ResolvedSpec(3, 32, True)}, ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(config)
    weights = [group.weights for group in parsed.config_groups.values()]
    assert [(w.num_bits, w.group_size, w.symmetric, w.strategy) for w in weights] == [
        (4, 64, True, "group"),
        (8, None, False, "channel"),
        (3, 32, True, "group"),
    ]


def test_exact_names_come_before_patterns_and_patterns_before_classes() -> None:
    config = build_config({}, ["lm_head", "re:.*vision.*"])
    targets = {"group_0": (["Linear"], 2), "group_1": (["re:.*down_proj$"], 3), "group_2": (["a.1.down_proj"], 8)}
    for name, (names, bits) in targets.items():
        group = build_config({"x": ResolvedSpec(bits, 32, True)}, [])["config_groups"]["group_0"]
        config["config_groups"][name] = {**group, "targets": names}
    read = parse_config(declared(config), "here")
    assert read is not None
    expected = {"a.0.up_proj": 2, "a.0.down_proj": 3, "a.1.down_proj": 8}
    assert {name: read.spec_of(name).num_bits for name in expected} == expected  # type: ignore[union-attr]
    assert read.spec_of("lm_head") is None
    assert read.spec_of("vision.0.down_proj") is None
    assert read.spec_of("a.0.embed", "Embedding") is None


def test_ignoring_a_class_ignores_all_of_it() -> None:
    config = build_config({MODULE: W4}, ["Linear"])
    read = parse_config(declared(config), "here")
    assert read is not None
    assert read.spec_of(MODULE) is None


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"strategy": None}, W4),
        ({"strategy": None, "group_size": -1}, ResolvedSpec(4, 0, True)),
        ({"strategy": "channel", "group_size": None}, ResolvedSpec(4, 0, True)),
        ({"group_size": 96}, ResolvedSpec(4, 96, True)),
        ({"actorder": "weight"}, W4),
        ({"actorder": "static", "observer": "mse", "zp_dtype": None}, W4),
        ({"symmetric": False}, ResolvedSpec(4, 64, False)),
    ],
)
def test_equivalent_spellings(changes: dict[str, Any], spec: ResolvedSpec) -> None:
    read = parse_config(with_weights(**changes), "here")
    assert read is not None
    assert read.spec_of(MODULE) == spec


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"type": "float"}, "type 'float'; qtale reads int"),
        ({"num_bits": 5}, "num_bits 5; qtale reads 2, 3, 4, 8"),
        ({"num_bits": True}, "num_bits True"),
        ({"num_bits": "4"}, "num_bits '4'"),
        ({"dynamic": True}, "dynamic True"),
        ({"dynamic": "local"}, "dynamic 'local'"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"symmetric": "yes"}, "symmetric 'yes'"),
        ({"strategy": "block"}, "strategy 'block'"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
        ({"group_size": 48}, "group_size 48; qtale reads multiples of 32"),
        ({"group_size": None}, "group_size None"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -64}, "group_size -64"),
    ],
)
def test_weight_schemes_that_qtale_does_not_read(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=f"here: config group 'group_0'.*{sentence}"):
        parse_config(with_weights(**changes), "here")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["quant_method"], "gptq", "quantized with 'gptq'"),
        (["quant_method"], None, "quantized with None"),
        (["format"], "int-quantized", "format 'int-quantized'"),
        (["format"], "mixed-precision", "format 'mixed-precision'"),
        (["quantization_status"], "frozen", "quantization_status 'frozen'"),
        (["kv_cache_scheme"], {"num_bits": 8}, "quantized KV cache"),
        (["transform_config"], {"config_groups": {"u": {}}}, "weight transforms"),
        (["sparsity_config"], {"format": "sparse-24-bitmask"}, "sparse weights"),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 8}, "quantizes activations"),
        (["config_groups", "group_0", "output_activations"], {"num_bits": 8}, "quantizes activations"),
        (["config_groups", "group_0", "format"], "naive-quantized", "format 'naive-quantized'"),
        (["config_groups", "group_0", "weights"], None, "no quantized weights"),
        (["config_groups", "group_0"], ["Linear"], "no quantized weights"),
    ],
)
def test_folders_that_qtale_does_not_read(path: list[str], value: Any, sentence: str) -> None:
    config = build_config({MODULE: W4}, [])
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UnsupportedError, match=f"here.*{sentence}"):
        parse_config(declared(config), "here")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("config_groups", {}, "must hold 'config_groups'"),
        ("config_groups", [1], "must hold 'config_groups'"),
        ("ignore", "lm_head", "list of strings"),
        ("ignore", ["re:("], "no regular expression"),
    ],
)
def test_broken_configs(key: str, value: Any, sentence: str) -> None:
    config = {**build_config({MODULE: W4}, []), key: value}
    with pytest.raises(CheckpointError, match=sentence):
        parse_config(declared(config), "here")
    with pytest.raises(CheckpointError, match="must be an object"):
        parse_config(declared([]), "here")  # type: ignore[arg-type]


def test_a_dense_config_is_none() -> None:
    assert parse_config({"model_type": "llama"}, "here") is None
    assert parse_config({"quantization_config": None}, "here") is None


def random_module(spec: ResolvedSpec, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    low, high = -(2 ** (spec.num_bits - 1)), 2 ** (spec.num_bits - 1)
    codes = torch.randint(low, high, (rows, cols), dtype=torch.int8)
    scale = torch.rand(rows, spec.groups(cols), dtype=torch.float32).to(torch.bfloat16)
    zero = None if spec.symmetric else torch.randint(low, high, scale.shape, dtype=torch.int8)
    return codes, scale, zero


def write_module(folder: Path, spec: ResolvedSpec, tensors: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(declared(build_config({MODULE: spec}, ["lm_head"]))))
    save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


specs = st.builds(ResolvedSpec, st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 32, 64, 96]), st.booleans())


@settings(max_examples=60, deadline=None)
@given(spec=specs, rows=st.integers(1, 70), groups=st.integers(1, 3), odd=st.integers(1, 75), seed=st.integers(0, 99))
def test_a_module_round_trips_and_agrees_with_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, spec: ResolvedSpec, rows: int, groups: int, odd: int, seed: int
) -> None:
    torch.manual_seed(seed)
    cols = spec.group_size * groups or odd
    codes, scale, zero = random_module(spec, rows, cols)
    tensors = packed_tensors(MODULE, codes, scale, zero, spec.num_bits)
    layout = packed_layout(MODULE, (rows, cols), spec, "BF16")
    assert {tensor.name: tensor.shape for tensor in layout.values()} == {k: tuple(v.shape) for k, v in tensors.items()}
    np.testing.assert_array_equal(unpack(np.asarray(tensors[f"{MODULE}.weight_packed"]), spec.num_bits, cols), codes)
    if zero is not None:
        packed_zero = np.asarray(tensors[f"{MODULE}.weight_zero_point"])
        np.testing.assert_array_equal(unpack(packed_zero.T, spec.num_bits, rows).T, zero)
    folder = open_folder(write_module(tmp_path_factory.getbasetemp() / "round", spec, tensors))
    module = packed_modules(folder)[MODULE]
    assert (module.spec, module.out_features, module.in_features, module.dtype) == (spec, rows, cols, "BF16")
    assert module.nbytes == folder.nbytes
    for read, written in zip(read_module(folder, module), (codes, scale, zero), strict=True):
        assert (read is None and written is None) or torch.equal(read, written)  # type: ignore[arg-type]


def damaged(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    spec = ResolvedSpec(4, 32, False)
    tensors = packed_tensors(MODULE, *random_module(spec, 40, 64), 4)
    for name, value in changes.items():
        if value is None:
            del tensors[f"{MODULE}.{name}"]
        else:
            tensors[f"{MODULE}.{name}"] = value
    return write_module(tmp_path / "m", spec, tensors)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"weight_scale": None}, CheckpointError, "weight_scale' is missing"),
        ({"weight_zero_point": None}, CheckpointError, "weight_zero_point' is missing"),
        ({"weight_shape": None}, CheckpointError, "weight_shape' is missing"),
        ({"weight_shape": torch.tensor([40, 63])}, CheckpointError, "63 is no multiple of group_size 32"),
        ({"weight_shape": torch.tensor([40, 96])}, CheckpointError, r"weight_packed is I32 \[40, 8\] where 4 bits"),
        ({"weight_shape": torch.tensor([-40, 64])}, CheckpointError, "must be positive"),
        ({"weight_shape": torch.tensor([2**62, 2**62])}, CheckpointError, "weight_packed is I32"),
        ({"weight_shape": torch.tensor([2, 40, 64])}, UnsupportedError, "qtale reads matrices"),
        ({"weight_scale": torch.ones(40, 1)}, CheckpointError, r"weight_scale is F32 \[40, 1\]"),
        ({"weight_scale": torch.ones(40, 2, dtype=torch.int32)}, UnsupportedError, "scales of dtype I32"),
        ({"weight_zero_point": torch.zeros(40, 2, dtype=torch.int8)}, CheckpointError, "weight_zero_point is I8"),
        ({"weight_packed": torch.zeros(40, 8, dtype=torch.int64)}, CheckpointError, "weight_packed is I64"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, UnsupportedError, "weight_g_idx"),
        ({"weight": torch.zeros(40, 64)}, CheckpointError, "stored dense"),
    ],
)
def test_tensors_that_disagree_with_the_config(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        packed_modules(open_folder(damaged(tmp_path, **changes)))
    assert MODULE in str(caught.value)


def test_packed_tensors_without_a_config_group_are_errors(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    config = json.loads((path / "config.json").read_text())
    other = copy.deepcopy(config)
    other["quantization_config"]["config_groups"]["group_0"]["targets"] = ["another.module"]
    (path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="no config group"):
        packed_modules(open_folder(path))
    (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no quantization_config"):
        packed_modules(open_folder(path))


def test_a_dense_folder_has_no_packed_modules(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert packed_modules(open_folder(tmp_path)) == {}
