"""The benchmark runs and its JSON has the fields that others read; how fast anything is belongs to no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qtale import _core

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = BENCHMARKS / "kernels.py"
FIELDS = {"kernel", "threads", "value", "unit", "limit", "limit_name", "share", "target", "ok", "samples", "disturbed"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(KERNELS), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def quick() -> dict:
    done = run("--quick", "--json", "-", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_measured(quick):
    rows = quick["results"]
    assert all(set(row) >= FIELDS for row in rows)
    assert all(row["value"] > 0 and row["threads"] == 1 for row in rows)
    names = {row["kernel"] for row in rows}
    for part in ("decode", "rows 1-16"):
        for kernel in ("W4 g32", "W4 g64", "W4 g128", "W8 channel", "W3 g128", "W2 g128"):
            assert f"{part} {kernel} int8" in names
        assert {f"{part} W4 g128 int16", f"{part} W4 g128 float"} <= names
    assert {"prefill W8 channel int8", "quantize float16 W4 g128", "prepack W3 g128"} <= names


def test_shares_are_ratios_and_quick_judges_nothing(quick):
    assert all(row["target"] is None and row["ok"] is None for row in quick["results"])
    decode = [row for row in quick["results"] if row["kernel"].startswith("decode")]
    assert all(row["share"] > 0 and row["limit"] > 0 and row["limit_name"].startswith("read, ") for row in decode)


def test_machine_and_limits_are_described(quick):
    assert quick["machine"]["isa"] in _core.cpu_isas()
    (limits,) = quick["limits"]
    assert limits["dram_read"] > 0
    assert limits["copy"] > 0
    assert set(limits) >= {"threads", "reader", "int8_dot", "int8_tile", "u4_int16", "f32_fma"}
    assert (limits["int8_tile"] is not None) == (quick["machine"]["isa"] == "avx512_amx")


def test_only_and_isa_choose(tmp_path):
    done = run("--quick", "--isa", "generic", "--only", "prepack unprepack W2", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["kernel"] for row in result["results"]} == {"prepack W2 g128", "unprepack W2 g128"}
    assert result["limits"][0]["int8_dot"] is None
    assert "unprepack W2 g128" in done.stdout


def test_an_unknown_isa_is_a_sentence():
    done = run("--isa", "sse9")
    assert done.returncode == 1
    assert "sse9" in done.stderr
    assert "Traceback" not in done.stderr


def test_importance_runs_beside_torch():
    command = [sys.executable, str(BENCHMARKS / "importance.py"), "--quick", "--json", "-", "--k", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = result["results"]
    assert [row["kernel"] for row in rows] == ["project_topk"] * 4 + ["jaccard"] * 2
    assert all(row["speedup"] > 0 and row["seconds"] > 0 and row["samples"] > 0 for row in rows)
    assert {(row["matrix"], row["rows"]) for row in rows[:4]} == {
        (matrix, count) for matrix in ("float16", "float32") for count in (1, 32)
    }
    assert all(row["k"] == 5 and row["torch_best"] in row["torch"] for row in rows[:4])
    assert result["machine"]["isa"] in _core.cpu_isas()


def test_solvers_are_measured_beside_torch():
    command = [sys.executable, str(BENCHMARKS / "solve.py"), "--quick", "--json", "-", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert len({row["solver"] for row in rows}) == len(rows) == 8
    assert all(row["seconds"] > 0 and row["faster"] > 0 for row in rows)
