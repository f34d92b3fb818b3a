"""`qtale bench` and benchmarks/engine.py run and give the fields that others read; how fast anything is belongs to no
test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qtale import _core
from qtale.bench import LlamaBench, find_llama_bench, gguf_bytes_per_token, peer_folder, write_shape
from qtale.bench.figures import judge, make_row, table
from qtale.bench.run import BenchOptions, bench
from qtale.bench.samples import Paired
from qtale.cli.main import main
from qtale.engine.spec import read_spec
from qtale.errors import Error, UnsupportedError
from qtale.spec import QuantSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import random_models  # noqa: E402

FIELDS = {"figure", "threads", "value", "unit", "share", "limit", "limit_name", "target", "ok", "samples", "disturbed"}
FAKE = """#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(options["-m"], "rb").read(4) == b"GGUF"
print(json.dumps([{{"samples_ts": [5.0, 7.0, 6.0], "options": options}}]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models.write_model(tmp_path_factory.mktemp("bench") / "m", random_models.TINY, QuantSpec(4))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    program = tmp_path / "llama-bench"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    return program


def test_the_command_gives_rows_and_limits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _core.num_threads()
    arguments = ["bench", str(model), "--threads", "1", "--batch", "1,2", "--prompt", "24", "--repeat", "2", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["figure"] for row in result["results"]] == ["decode", "decode batch 1", "decode batch 2", "prefill 24"]
    assert all(set(row) >= FIELDS and row["value"] > 0 and row["threads"] == 1 for row in result["results"])
    assert result["machine"]["isa"] in _core.cpu_isas()
    assert result["limits"][0]["dram_read"] > 0
    assert _core.num_threads() == before


def test_bytes_of_a_token_are_those_of_the_matrices(model: Path) -> None:
    shape = random_models.TINY
    result = bench(model, BenchOptions(batches=(1,), prompt=8, repeats=1), progress=False)
    head = 2 * shape.vocab * shape.hidden
    weights = sum(rows * cols for _, (rows, cols) in shape.matrices())
    assert result["weights"]["head_bytes"] == head
    layers = result["weights"]["token_bytes"] - head
    assert 4.125 / 8 * weights <= layers <= 4.5 / 8 * weights


def test_the_table_names_every_figure(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model), "--threads", "1", "--batch", "1", "--prompt", "8", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert "prefill 8" in text
    assert "MB of weights" in text


def test_a_peer_stands_beside(model: Path, fake: Path) -> None:
    options = BenchOptions(batches=(1,), prompt=8, repeats=1, peer="llama.cpp", peer_path=fake)
    rows = bench(model, options, progress=False)["results"]
    beside = {row["figure"]: row for row in rows if "over" in row["figure"]}
    assert set(beside) == {"decode over llama.cpp Q4_0", "prefill over llama.cpp Q4_0"}
    assert all(row["limit"] == 6.0 and row["share"] == pytest.approx(row["value"] / 6.0) for row in beside.values())


def test_a_peer_that_fails_is_named(tmp_path: Path, fake: Path) -> None:
    fake.write_text(f"#!{sys.executable}\nprint('no model')\n")
    with pytest.raises(Error, match=r"peer: .* gave no result"):
        LlamaBench("peer", fake, tmp_path / "none.gguf").decode(4, 1)


def test_without_a_peer_it_says_what_to_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("qtale.bench.llama_bench.peer_folder", lambda: tmp_path)
    assert main(["bench", str(model), "--peer", "llama.cpp"]) == 1
    assert "benchmarks/peers.py --build" in capsys.readouterr().err


def test_a_built_peer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("qtale.bench.llama_bench.peer_folder", lambda: tmp_path)
    programs = tmp_path / "llama.cpp-1.2.3" / "build" / "bin"
    programs.mkdir(parents=True)
    built = programs / "llama-bench"
    fake.rename(built)
    assert find_llama_bench() == built
    assert find_llama_bench(programs) == built
    assert peer_folder.__module__ == "qtale.bench.llama_bench"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "one"], "--threads 'one'"),
        (["--batch", "0"], "from 1"),
        (["--prompt", "100000"], "beyond the context"),
        (["--peer", "other"], "'other' is not known"),
        (["--peer-path", "/nowhere"], "is no program"),
    ],
)
def test_wrong_options_are_sentences(
    model: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_files_for_peers_have_the_shape(tmp_path: Path, kind: str) -> None:
    import gguf

    spec = read_spec(random_models.TINY.config(), "tiny")
    path = write_shape(tmp_path / "m.gguf", spec, kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [spec.intermediate_size, spec.hidden_size]
    assert tensors["output.weight"].tensor_type.name == ("Q6_K" if kind == "Q4_0" else kind)
    matrices = [tensor for name, tensor in tensors.items() if "norm" not in name and name != "token_embd.weight"]
    assert gguf_bytes_per_token(path) == sum(tensor.n_bytes for tensor in matrices)
    values = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
    assert np.isfinite(values).all()
    assert 0.01 < float(np.std(values)) < 0.04


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    spec = read_spec(random_models.TINY.config(), "tiny")
    with pytest.raises(UnsupportedError, match="Q2_K"):
        write_shape(tmp_path / "m.gguf", spec, "Q2_K")


def test_targets_are_reached_from_either_side() -> None:
    row = make_row("x", 1.0, "s", Paired(1.0, 2.0, 0.5, 0, 1, 0))
    assert judge(row, 0.5)["ok"] is True
    assert judge(row, 0.6)["ok"] is False
    assert judge(row, 0.4, at_most=True)["ok"] is False
    assert judge(row, None)["ok"] is None
    assert "<= 0.40" in table([judge(row, 0.4, at_most=True)])


def test_the_benchmark_runs_and_judges_nothing_when_quick(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--quick", "--model", "tiny", "--threads", "1,2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert all(set(row) >= FIELDS and row["ok"] is None and row["value"] > 0 for row in rows)
    found = {row["figure"] for row in rows if row["model"] == "tiny W4"}
    assert found >= {"decode", "prefill 32", "prefill 96", "batch 2 : 1", "load, second time", "KV bytes r=0.5"}
    assert found >= {"static depth r=0.5", "routed decode r=0.5", "routed prefill 32 r=0.5", "decode 2 threads : 1"}
    routed = [row for row in rows if row["figure"].startswith(("routed", "static"))]
    assert all(0 < row["ratio"] <= 1 for row in routed)
    models = {row["model"] for row in rows}
    assert models == {"tiny W4", "tiny W4 int16", "tiny W4 head 8", "tiny W8", "tiny W3"}


def test_only_chooses_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--quick", "--model", "tiny", "--threads", "1"]
    done = subprocess.run(
        [*command, "--only", "W4 routed decode", "--json", "-"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["figure"] for row in json.loads(done.stdout)["results"]] == ["routed decode r=0.5"]
