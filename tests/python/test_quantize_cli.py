"""`qtale quantize`: tables and JSON on stdout, sentences on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtale.cli.main import main

WANTED = """\
layer                                count     shape  bits    group  zero     before     after
-----------------------------------  -----  --------  ----  -------  ----  ---------  --------
model.layers.{0-4}.mlp.down_proj         5  64 x 172     4  channel        215.0 KiB  28.8 KiB
model.layers.{0-4}.mlp.gate_proj         5  172 x 64     4       64        215.0 KiB  30.3 KiB
model.layers.{0-4}.mlp.up_proj           5  172 x 64     4       64        215.0 KiB  30.3 KiB
model.layers.{0-4}.self_attn.k_proj      5   32 x 64     4       64         40.0 KiB   5.7 KiB
model.layers.{0-4}.self_attn.o_proj      5   64 x 64     4       64         80.0 KiB  11.3 KiB
model.layers.{0-4}.self_attn.q_proj      5   64 x 64     4       64         80.0 KiB  11.3 KiB
model.layers.{0-4}.self_attn.v_proj      5   32 x 64     4       64         40.0 KiB   5.7 KiB

35 layers: 1015.8 KiB → 254.3 KiB, 8.01 bits per weight (4.47 in the quantized layers)
"""


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def stories(qtale_data: Path) -> str:
    return str(qtale_data / "models" / "stories260K")


def test_a_dry_run_shows_the_table(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", stories, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(WANTED)
    assert "dry run: nothing was written; quantizing needs about" in shown


def test_quantize_writes_and_reports_json(stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", stories, "-o", str(out), "--bits", "3", "--group-size", "channel", "--asymmetric", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(out)
    assert {(row["num_bits"], row["group_size"], row["symmetric"]) for row in report["layers"]} == {(3, 0, False)}
    assert all(0.05 < row["error"] < 0.5 for row in report["layers"])
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == report["bytes_after"]
    assert found["bits_per_weight_quantized"] == report["bits_per_weight_quantized"]


def test_all_shows_a_line_for_every_layer(stories: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", stories, "--dry-run", "--all"]) == 0
    assert capsys.readouterr().out.count(".self_attn.q_proj ") == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bits", "5"], "num_bits 5 is not supported; use one of 2, 3, 4, 8"),
        (["--group-size", "48"], "group_size 48 is not supported"),
        (["--group-size", "rows"], "group_size 'rows' is not supported"),
        (["--group-size", "64"], "down_proj: in_features 172 is not a multiple of group_size 64"),
    ],
)
def test_wrong_options_are_one_sentence_and_write_nothing(
    stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["quantize", stories, "-o", str(tmp_path / "out"), *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("qtale: error: ")
    assert shown.err.count("\n") == 1
    assert sentence in shown.err
    assert files_in(tmp_path) == []


def test_a_missing_output_and_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path)]) == 1
    assert "add -o OUT, or --dry-run" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "none"), "--dry-run"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_demo_means_the_demo_model(
    stories: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtale.demo.model", lambda: Path(stories))
    assert main(["quantize", "demo", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == stories
    assert main(["inspect", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == stories
