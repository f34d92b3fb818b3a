"""What is free: sizes as people write them, control groups, devices that are not here; what models need, by shape."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import qtale
from plan_samples import SIZES, save_model
from qtale import QuantSpec
from qtale.checkpoint import open_folder
from qtale.errors import CheckpointError, Error, InputError, UnsupportedError
from qtale.memory import (
    Device,
    budget,
    devices,
    host,
    most_free,
    needed,
    nvml,
    parse_size,
    shape_of_config,
    shape_of_folder,
    usable_devices,
)
from qtale.memory.devices import _cpu
from qtale.memory.nvml import Gpu, visible
from qtale.memory.runtime import MODULE_BYTES

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 * GIB), ("1.5 MiB", 3 << 19), ("4096 B", 4096), ("2KB", 2000), ("0.1GB", 10**8), (" 3MB ", 3 * 10**6)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@given(st.integers(0, 2**60))
def test_bytes_come_back(count: int) -> None:
    assert parse_size(f"{count}B") == count


@pytest.mark.parametrize("text", ["", "6", "6G", "6gib", "-1GiB", "1e3MB", "GiB", "6 GiB free", "nan", "٣GiB", "1,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size; write a number and a unit of B, KiB, MiB, GiB, KB, MB, GB"):
        parse_size(text)
    with pytest.raises(InputError, match="more than any machine has"):
        parse_size("99999999999GiB")


def make_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"}


def test_without_control_groups_the_kernel_says_what_is_available(tmp_path: Path) -> None:
    make_root(tmp_path, MEMINFO)
    assert host.available(tmp_path) == 8 * GIB
    assert host.group_limit(tmp_path) is None
    assert _cpu(tmp_path) == Device("cpu", "main memory", 16 * GIB, 8 * GIB)


def test_the_tightest_control_group_of_version_2_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    make_root(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            f"{group}/b/memory.max": "max\n",
            f"{group}/b/memory.current": "1\n",
            f"{group}/memory.max": f"{4 * GIB}\n",
            f"{group}/memory.current": f"{3 * GIB}\n",
            f"{group}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        },
    )
    assert host.available(tmp_path) == 2 * GIB
    assert _cpu(tmp_path).total_bytes == 4 * GIB
    (tmp_path / group / "memory.max").write_text(f"{12 * GIB}\n")
    assert host.available(tmp_path) == 8 * GIB


def test_version_1_and_groups_of_the_host_that_a_container_does_not_see(tmp_path: Path) -> None:
    make_root(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "4:cpu,memory:/docker/x\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        },
    )
    assert host.available(tmp_path) == 0
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host.available(tmp_path) == 8 * GIB


def test_a_kernel_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"give a budget such as 6GiB"):
        _cpu(tmp_path)


def test_this_machine_has_some_memory_free() -> None:
    found = {device.name: device for device in devices()}
    assert 0 < found["cpu"].free_bytes <= found["cpu"].total_bytes
    assert usable_devices()[0].name == "cpu"


GPUS = [
    Gpu(f"GPU-{letter * 4}", f"card {letter}", 80 * GIB, free * GIB)
    for letter, free in zip("abc", (9, 70, 5), strict=True)
]


@pytest.mark.parametrize(
    ("listed", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-bb,0", [1, 0]),
        ("0,-1,1", [0]),
        ("0,9,1", [0]),
        ("0,0,1", [0]),
        ("GPU-", []),
    ],
)
def test_cuda_visible_devices_is_respected(listed: str | None, places: list[int]) -> None:
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible(GPUS, environment) == [GPUS[place] for place in places]


def test_devices_are_asked_through_the_driver_where_torch_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "all_gpus", lambda: GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    monkeypatch.delitem(sys.modules, "torch")
    found = devices()
    assert [device.name for device in found] == ["cpu", "cuda:0", "cuda:1"]
    assert found[2] == Device("cuda:1", "card b", 80 * GIB, 70 * GIB)
    assert most_free(found).name == "cuda:1"


def test_devices_are_asked_through_torch_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [3 * GIB, 7 * GIB]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (free[index], 8 * GIB),
        get_device_name=lambda index: f"fake {index}",
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert devices()[1:] == (
        Device("cuda:0", "fake 0", 8 * GIB, 3 * GIB),
        Device("cuda:1", "fake 1", 8 * GIB, 7 * GIB),
    )


def test_the_driver_is_not_needed() -> None:
    assert nvml.all_gpus() == [] or all(gpu.free <= gpu.total for gpu in nvml.all_gpus())


def test_a_budget_is_given_or_overridden_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTALE_MEMORY_BUDGET", raising=False)
    found = [Device("cpu", "", 16 * GIB, 4 * GIB), Device("cuda:0", "", 8 * GIB, 7 * GIB)]
    assert budget("auto", lambda: found).num_bytes == 7 * GIB
    assert budget("auto", lambda: found).source == "7.0 GiB free on cuda:0"
    monkeypatch.setenv("QTALE_MEMORY_BUDGET", "5GiB")
    assert budget("auto", lambda: found).num_bytes == 5 * GIB
    assert budget("3GiB", lambda: found).num_bytes == 3 * GIB
    assert budget(77, lambda: found).num_bytes == 77
    with pytest.raises(InputError, match="budget -1 is no size"):
        budget(-1)
    monkeypatch.setenv("QTALE_MEMORY_BUDGET", "much")
    with pytest.raises(InputError, match="QTALE_MEMORY_BUDGET 'much' is no size"):
        budget()


FAMILY = [
    LlamaConfig(**SIZES),
    LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    MistralConfig(**SIZES, head_dim=16),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=48, tie_word_embeddings=True),
]


@pytest.mark.parametrize("config", FAMILY, ids=lambda config: config.model_type)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_config_alone_gives_the_shape_of_the_folder(
    config: PretrainedConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "model")
    folder = open_folder(tmp_path / "model")
    assert shape_of_config(folder.config) == shape_of_folder(folder)


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, "channel"), QuantSpec(3, 32), QuantSpec(2, 64, False)])
def test_weights_are_those_that_load_torch_holds(tmp_path: Path, spec: QuantSpec) -> None:
    model = save_model(tmp_path / "model")
    qtale.quantize(model, tmp_path / "out", spec, progress=False)
    loaded = qtale.load_torch(tmp_path / "out")
    layers = [[*layer.parameters(), *layer.buffers()] for layer in loaded.model.layers]
    linears = {linear.name for linear in shape_of_folder(open_folder(model)).linears}
    needs = needed(
        shape_of_folder(open_folder(model)), lambda name: spec if name in linears else None, context=10, batch=3
    )
    norms = 2 * 128 * 2
    assert [size + norms for size in needs.layers] == [sum(tensor.nbytes for tensor in layer) for layer in layers]
    every = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.model.layers.buffers()])
    assert needs.weights == every + MODULE_BYTES * len(linears)
    with torch.no_grad():
        cache = loaded(torch.ones(3, 10, dtype=torch.long), use_cache=True).past_key_values
    assert needs.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def broken(**changes: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": "llama", **changes}


def test_configs_that_say_too_little_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="tensors of model_type 'gpt2' do not follow from its config; known are"):
        shape_of_config(broken(model_type="gpt2"))
    for key in ("head_dim", "num_key_value_heads"):
        with pytest.raises(CheckpointError, match=f"{key} is '64'; it must be a positive integer"):
            shape_of_config(broken(**{key: "64"}))
    for value in (None, 0, "128", True):
        with pytest.raises(CheckpointError, match=r"hidden_size is .*; it must be a positive integer"):
            shape_of_config(broken(hidden_size=value))
    shape = shape_of_config(broken())
    with pytest.raises(InputError, match="context -1 and batch 1"):
        needed(shape, lambda _: None, context=-1, batch=1)
