"""Calibrated quantization: bad input is a sentence and nothing is written; the command does what the function does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qtale
from importance_samples import VOCAB, add_tokenizer, save_model, some_tokens, write_words
from qtale import QuantSpec, SolverOptions
from qtale.cli.main import main
from qtale.errors import InputError

SMALL = ["--group-size", "32", "--num-samples", "3", "--seq-len", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(save_model(tmp_path_factory.mktemp("refusals") / "llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "calibration.txt")


def test_the_command_writes_what_the_function_writes(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "quantize",
        str(model),
        "-o",
        str(tmp_path / "a"),
        "--method",
        "gptq",
        "--calibration",
        str(text),
        *SMALL,
    ]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(row["output_error"] <= row["rtn_output_error"] and row["seconds"] > 0 for row in report["layers"])
    options = SolverOptions("gptq", num_samples=3, seq_len=8)
    qtale.quantize(model, tmp_path / "b", QuantSpec(4, 32), method=options, calibration=text, progress=False)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gptq", "--num-samples", "300"], "sequences of 8 need 2400"),
        (["--method", "gptq", "--calibration", "nowhere.txt"], "cannot be read"),
        (["--method", "gptq", "--calibration", "binary.txt"], "is no UTF-8 text"),
        (["--method", "gptq", "--calibration", "empty.txt"], "has 0 tokens"),
        (["--method", "gptq", "--damp", "0"], "damp 0.0 must be above 0"),
        (["--method", "gptq", "--seed", "-1"], "seed -1 must be a whole number"),
        (["--damp", "0.1"], "rounding to nearest looks at no data"),
        (["--method", "gptq", "--max-memory", "much"], "--max-memory"),
    ],
)
def test_wrong_options_are_one_sentence_and_write_nothing(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    defaults = [*SMALL] if "--method" in arguments else ["--group-size", "32"]
    if "--calibration" not in arguments and "--method" in arguments:
        defaults += ["--calibration", str(text)]
    assert main(["quantize", str(model), "-o", "out", *defaults, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("qtale: error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((0, 4), np.int64), "no calibration sequence"),
        ([[1, 2], [3]], "sequence 1 has 1 tokens"),
        ([[0.5, 1.5]], "whole token numbers"),
        ([[1, VOCAB]], "take the tokenizer of this model"),
        ([[1, -1]], "take the tokenizer of this model"),
    ],
)
def test_tokens_are_checked(model: Path, tmp_path: Path, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        qtale.quantize(model, tmp_path / "out", QuantSpec(4, 32), method="gptq", tokens=tokens, progress=False)
    assert not (tmp_path / "out").exists()


def test_rounding_takes_no_data(model: Path, tmp_path: Path) -> None:
    for settings in ({"tokens": some_tokens()}, {"resume": tmp_path / "state"}):
        with pytest.raises(InputError, match="takes no calibration tokens"):
            qtale.quantize(model, tmp_path / "out", QuantSpec(4, 32), progress=False, **settings)  # type: ignore[arg-type]


def test_tuning_without_memory_is_left_out_and_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qtale.ptq import calibrated

    tokens = some_tokens()
    settings: dict[str, Any] = {"tokens": tokens, "progress": False}
    plain = SolverOptions("auto", tune_steps=0)
    qtale.quantize(model, tmp_path / "plain", QuantSpec(3, 32), method=plain, **settings)
    monkeypatch.setattr(calibrated, "available", lambda: 1000)
    qtale.quantize(model, tmp_path / "small", QuantSpec(3, 32), method="auto", **settings)
    assert "end-to-end tuning is left out: it needs about" in caplog.text
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "small"))
    assert first == second
