"""Calibrated methods on small models: better than rounding, and folders that every reader takes alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtale
from importance_samples import ARCHITECTURES, load_model, save_model, some_tokens
from qtale import QuantSpec, SolverOptions
from qtale.checkpoint import open_folder
from qtale.errors import InputError
from qtale.ptq.options import METHODS
from tiny_models import run_python

CALIBRATED = tuple(method for method in METHODS if method != "rtn")
TOKENS = some_tokens(8, 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ARCHITECTURES}


def quantized(model: Path, out: Path, method: str, bits: int = 4, **changes: Any) -> qtale.ptq.QuantizeReport:  # type: ignore[name-defined]
    options = SolverOptions(method, **{"tune_steps": 4 if method == "auto" else None, **changes})
    spec = QuantSpec(bits, 32)
    tokens = TOKENS if options.calibrated else None
    return qtale.quantize(model, out, spec, method=options, tokens=tokens, progress=False)


def divergence(model: Path, quantized_folder: Path) -> float:
    """KL(dense || quantized) in nats per token on other sequences than those of the calibration."""
    tokens = torch.from_numpy(some_tokens(4, 32, seed=9))
    with torch.no_grad():
        dense = load_model(model)(tokens).logits.log_softmax(-1)
        found = qtale.load_torch(quantized_folder, compute="float", dtype="float32")(tokens).logits.log_softmax(-1)
    total = torch.nn.functional.kl_div(found, dense, reduction="sum", log_target=True)
    return float(total) / tokens.numel()


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("bits", [3, 4])
def test_better_than_rounding(models: dict[str, Path], tmp_path: Path, method: str, bits: int) -> None:
    quantized(models["llama"], tmp_path / "rtn", "rtn", bits)
    report = quantized(models["llama"], tmp_path / "out", method, bits)
    assert all(row.output_error is not None and row.rtn_output_error is not None for row in report.layers)
    if "awq" not in method:  # whose rows are compared after scaling
        assert all(row.output_error <= row.rtn_output_error for row in report.layers)  # type: ignore[operator]
    if "magr" not in method:  # random weights have no null space for it to use
        assert divergence(models["llama"], tmp_path / "out") < divergence(models["llama"], tmp_path / "rtn")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_architecture(models: dict[str, Path], tmp_path: Path, kind: str, method: str) -> None:
    quantized(models[kind], tmp_path / "rtn", "rtn", 3)
    quantized(models[kind], tmp_path / "out", method, 3)
    assert divergence(models[kind], tmp_path / "out") < divergence(models[kind], tmp_path / "rtn")


@pytest.mark.parametrize("method", CALIBRATED)
def test_every_reader_gives_the_same_logits(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    import transformers

    quantized(models["llama"], tmp_path / "out", method)
    ids = some_tokens(1, 20, seed=3)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = qtale.load_torch(tmp_path / "out", compute="float", dtype="float32")
    engine = qtale.load(tmp_path / "out", compute="float", kv_dtype="float32")
    with torch.no_grad():
        expected = plain(torch.from_numpy(ids)).logits[0].numpy()
        torch_path = ours(torch.from_numpy(ids)).logits[0].numpy()
    reach = float(np.ptp(expected))
    assert np.abs(torch_path - expected).max() < 1e-3 * reach
    assert np.abs(engine.logits(ids[0].tolist()) - expected).max() < 1e-3 * reach


@pytest.mark.parametrize("method", ["gptq", "awq", "auto"])
def test_asymmetric_and_per_channel(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    options = SolverOptions(method, tune_steps=2)
    for number, spec in enumerate((QuantSpec(3, 32, symmetric=False), QuantSpec(3, "channel"), QuantSpec(2, 32))):
        qtale.quantize(models["llama"], tmp_path / f"rtn{number}", spec, progress=False)
        qtale.quantize(models["llama"], tmp_path / f"{number}", spec, method=options, tokens=TOKENS, progress=False)
        found = divergence(models["llama"], tmp_path / f"{number}")
        assert found < divergence(models["llama"], tmp_path / f"rtn{number}")


def test_layers_left_dense_and_mixed_bits(models: dict[str, Path], tmp_path: Path) -> None:
    overrides = {f"model.layers.1.{name}": None for name in ("mlp.down_proj", "self_attn.o_proj")}
    overrides |= {f"model.layers.0.mlp.{name}_proj": QuantSpec(8, 32) for name in ("gate", "up")}  # type: ignore[misc]
    out = tmp_path / "out"
    report = qtale.quantize(
        models["llama"], out, QuantSpec(3, 32), method="awq", overrides=overrides, tokens=TOKENS, progress=False
    )
    widths = {row.name: row.num_bits for row in report.layers}
    assert widths["model.layers.0.mlp.up_proj"] == 8
    assert not set(overrides).intersection(widths) - {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")}
    assert torch.equal(
        open_folder(out).torch("model.layers.1.mlp.down_proj.weight"),
        open_folder(models["llama"]).torch("model.layers.1.mlp.down_proj.weight"),
    )


def test_same_seed_same_files(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantized(models["llama"], tmp_path / name, "auto", 3)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_tuning_lowers_the_divergence(models: dict[str, Path], tmp_path: Path) -> None:
    quantized(models["llama"], tmp_path / "plain", "auto", 3, tune_steps=0)
    quantized(models["llama"], tmp_path / "tuned", "auto", 3, tune_steps=32)
    assert divergence(models["llama"], tmp_path / "tuned") < divergence(models["llama"], tmp_path / "plain")


def test_dead_inputs_and_idle_layers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    folder = open_folder(model)
    tensors = {name: folder.torch(name) for name in folder.tensors}
    tensors["model.layers.1.input_layernorm.weight"][:8] = 0
    tensors["model.layers.2.post_attention_layernorm.weight"][:] = 0
    from safetensors.torch import save_file

    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for method in ("gptq", "awq", "magr+gptq", "auto"):
        report = quantized(model, tmp_path / method, method, 3)
        assert all(np.isfinite(row.output_error) for row in report.layers)  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    for wrong in (
        {"method": "best"},
        {"num_samples": 0},
        {"damp": 0.0},
        {"magr_alpha": 2.0},
        {"tune_steps": -1},
        {"seq_len": 1},
    ):
        with pytest.raises(InputError, match="quantize: "):
            SolverOptions(**wrong)  # type: ignore[arg-type]
    assert dataclasses.replace(SolverOptions("auto"), tune_steps=0).tuning == 0
    assert SolverOptions("gptq").tuning == 0 < SolverOptions("auto").tuning


def test_a_dry_run_estimates_time_and_memory(models: dict[str, Path]) -> None:
    def expected(count: int, max_memory: int) -> qtale.QuantizeReport:
        options: dict[str, Any] = {"method": SolverOptions("gptq", num_samples=count), "max_memory": max_memory}
        return qtale.quantize(models["llama"], None, QuantSpec(4, 32), **options, dry_run=True)

    few, many, filed = expected(8, 8 << 30), expected(4096, 8 << 30), expected(4096, 0)
    assert few.estimated_seconds is not None
    assert many.estimated_seconds is not None
    assert 0 < few.estimated_seconds < many.estimated_seconds
    # What is larger than may be in memory lies in files.
    assert filed.peak_bytes < few.peak_bytes < many.peak_bytes
    rounding = qtale.quantize(models["llama"], None, QuantSpec(4, 32), dry_run=True)
    assert rounding.estimated_seconds is None
    assert rounding.peak_bytes < few.peak_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_calibrated_run_reads_of_the_embedding_what_its_tokens_need(tmp_path: Path) -> None:
    small = save_model(tmp_path / "small")
    large = save_model(tmp_path / "large", vocab_size=1 << 20)
    code = (
        "import re, pathlib, numpy as np, qtale\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text()).group(1)) * 1024\n"
        "tokens = np.arange(64).reshape(4, 16)\n"
        "def run(model, out):\n"
        "    settings = {'method': qtale.SolverOptions('gptq'), 'tokens': tokens, 'progress': False}\n"
        "    qtale.quantize(model, out, qtale.QuantSpec(4, 32), **settings)\n"
        f"run({str(small)!r}, 'one')\n"
        "before = peak()\n"
        f"run({str(large)!r}, 'two')\n"
        "print(peak() - before)\n"
    )
    # The embedding has 256 MiB; copying it takes pieces of 16.
    assert int(run_python(code, tmp_path)) < 64 << 20
