"""The benchmarks of scoring and of long runs work and tell what they should; their figures belong to no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval_samples import write_documents, write_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_model(root / "model")
    write_documents(root / "data")
    return root


def run(script: str, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_scoring_stands_beside_lm_evals_own_model(folder: Path) -> None:
    given = [f"--model={folder / 'model'}", f"--data={folder / 'data'}", "--limit=2", "--batches=2", "--threads=1"]
    only = ["--only=engine dense", "--only=float32"]
    result, text = run("eval_speed.py", *given, *only)
    rows = {row["name"]: row for row in result["results"]}
    assert set(rows) == {"engine dense", "hf float32, batch 2"}
    assert all(row["documents"] == 4 and row["requests"] == 12 and row["seconds"] > 0 for row in rows.values())
    assert len({json.dumps(row["accuracies"]) for row in rows.values()}) == 1
    assert rows["hf float32, batch 2"]["faster"]["float32, default"] == 1
    assert "| engine dense |" in text


def test_quality_is_measured_without_windows_of_perplexity(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    given = [
        f"--model={folder / 'model'}",
        f"--data={folder / 'data'}",
        "--tasks=arc_easy",
        "--limit=2",
        f"--json={out}",
    ]
    command = [sys.executable, str(BENCHMARKS / "quality.py"), *given, "--form=dense", "--form=W8 per channel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["form"] for row in rows] == ["dense", "W8 per channel"]
    assert all(0 <= row["arc_easy"]["acc"] <= 1 for row in rows)
    assert "| W8 per channel |" in done.stdout


@pytest.mark.parametrize("routed", [False, True])
def test_a_short_soak_changes_nothing(folder: Path, routed: bool) -> None:
    given = [f"--model={folder / 'model'}", "--minutes=0.02", "--tokens=8", "--threads=2"] + ["--routed"] * routed
    result, text = run("soak.py", *given)
    assert result["ok"], text
    assert result["changed"] == []
    assert result["routed"] == routed
    assert {"batch", "depth", "theta", "perplexity", "loglikelihood", "conversation"} <= set(result["calls"])
    assert result["rss_end"] > 0


def test_table_one_is_scored_on_the_engine_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The lake is cold and the sun is far away. " * 40, encoding="utf-8")
    given = [
        f"--model={folder / 'model'}",
        f"--data={folder / 'data'}",
        f"--calibration={text}",
        "--tasks=piqa,arc_easy",
    ]
    sizes = [
        f"--work={tmp_path / 'work'}",
        "--num-sequences=2",
        "--seq-len=32",
        "--top-k=20",
        "--averages",
        "6",
        "--tasks=piqa,arc_easy",
    ]
    stopped, _ = run("lsaq_tasks.py", *given, "--time-limit=0", *sizes)
    found, table = run("lsaq_tasks.py", *given, *sizes)
    assert (stopped["unfinished"], found["unfinished"]) == (6, 0)
    rows = [(row["method"], row["average"], sorted(row["tasks"])) for row in found["rows"]]
    tasks = ["arc_easy", "piqa"]
    assert rows == [("dense", 16, tasks), ("greedy jaccard", 6.0, tasks), ("greedy lim", 6.0, tasks)]
    assert all(0 <= one["accuracy"] <= 100 for row in found["rows"] for one in row["tasks"].values())
    assert "±" in table
