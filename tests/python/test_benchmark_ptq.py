"""benchmarks/ptq.py runs on a small model and goes on where it stopped; GPTQ's layout is read exactly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from importance_samples import add_tokenizer, save_model, write_words

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))  # as Python does for a script
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = add_tokenizer(save_model(tmp_path / "model", intermediate_size=128))
    text = write_words(tmp_path / "wikitext2" / "wiki.test.raw", 80, 8, seed=1)
    given = {"--model": model, "--data": tmp_path, "--calibration": text, "--work": tmp_path / "work", "--json": "-"}
    command = [sys.executable, str(FOLDER / "ptq.py"), "--quick", "--threads", "1", "--forms", "W3 g64"]
    command += ["--methods", "gptq,auto,untuned-even", *(str(part) for pair in given.items() for part in pair)]
    stopped = subprocess.run([*command, "--time-limit", "0"], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(stopped.stdout)["unfinished"] == 5
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == ["dense", "rtn", "gptq", "auto", "untuned-even"]
    assert found["unfinished"] == 0
    assert all(row["perplexity"] > 1 and row["bytes"] > 0 for row in found["rows"])
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 1 << 20 for row in found["rows"][1:])
    assert "| gptq |" in done.stderr
    before = (tmp_path / "work" / "rows.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(again.stdout)["rows"] == found["rows"]
    assert (tmp_path / "work" / "rows.json").read_bytes() == before


def test_layers_of_a_shape_are_timed() -> None:
    command = [sys.executable, str(FOLDER / "ptq_shape.py"), "--quick", "--threads", "1", "--json", "-"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout)
    assert found["operations"] > 0
    assert found["share"] == pytest.approx(found["operations"] / found["cpu_seconds"] / found["f32_fma_peak"])
    assert found["peak_bytes"] > 1 << 20


def test_an_unknown_method_is_a_sentence() -> None:
    command = [sys.executable, str(FOLDER / "ptq.py"), "--data", ".", "--work", ".", "--methods", "gptx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'gptx' is not known; use rtn, gptq" in done.stderr


def test_the_share_of_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("ptq_table", monkeypatch)
    assert table.closed(20.0, 40.0, 10.0) == pytest.approx(0.5)
    assert table.closed(10.0, 40.0, 10.0) == pytest.approx(1)
    assert table.closed(80.0, 40.0, 10.0) == pytest.approx(-0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_folders_are_read_exactly(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    peers = load("ptq_peers", monkeypatch)
    generator = np.random.default_rng(bits)
    columns, rows, group = 64, 32, 32
    codes = generator.integers(0, 1 << bits, (columns, rows))
    zeros = generator.integers(1, (1 << bits) + 1, (columns // group, rows))
    scales = torch.from_numpy(generator.random((columns // group, rows))).half()
    order = torch.from_numpy(generator.permutation(columns) // group).int()
    stored = {
        "m.qweight": torch.from_numpy(pack(codes.T, bits).T.copy()),
        "m.qzeros": torch.from_numpy(pack(zeros - 1, bits)),
        "m.scales": scales,
        "m.g_idx": order,
        "norm.weight": torch.ones(4, dtype=torch.float16),
    }
    folder = tmp_path / "gptq"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": bits}}
    (folder / "config.json").write_text(json.dumps(config))
    assert peers.is_gptq(folder)
    out = peers.dequantize_gptq(folder, tmp_path / "dense")
    # A zero point of 2^bits, stored as 2^bits - 1, wraps to 0.
    at = torch.from_numpy(zeros % (1 << bits))[order.long()]
    expected = ((torch.from_numpy(codes) - at).float() * scales.float()[order.long()]).T
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {"m.weight", "norm.weight"}
    assert torch.equal(tensors["m.weight"], expected)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers [rows, n] as a little-endian stream of bits in int32 [rows, n * bits / 32]."""
    single = (numbers[..., None] >> np.arange(bits)) & 1
    raw = np.packbits(single.reshape(len(numbers), -1).astype(np.uint8), axis=1, bitorder="little")
    return raw.view("<i4")
