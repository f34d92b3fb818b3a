"""benchmarks/lsaq.py runs on a small model, and a second run computes nothing again; the figures belong to no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from importance_samples import VOCAB, save_model
from qtale.report import Results
from test_measure_cli import add_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lsaq.py"


def test_it_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = add_tokenizer(save_model(tmp_path / "model", tie_word_embeddings=True, intermediate_size=128))
    text = tmp_path / "wikitext2" / "wiki.test.raw"
    text.parent.mkdir()
    lines = np.random.default_rng(1).integers(1, VOCAB, (80, 8))
    text.write_text("\n\n".join(" ".join(f"w{number}" for number in line) for line in lines))
    given = {"--model": model, "--data": tmp_path, "--calibration": text, "--work": tmp_path / "work", "--json": "-"}
    command = [sys.executable, str(SCRIPT), "--quick", *(str(part) for pair in given.items() for part in pair)]
    stopped = subprocess.run([*command, "--time-limit", "0"], capture_output=True, text=True, timeout=300, check=True)
    left = json.loads(stopped.stdout)["unfinished"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert left > found["unfinished"] == 0
    methods = {point.method for point in Results.from_json(found).points(64)}
    planned = {"knapsack best", "knapsack fisher", "knapsack kl"}
    assert methods >= {"dense", "uniform", "uniform mix", "random", "greedy jaccard", *planned}
    same = {row["bits"] for row in found["rows"] if row["average"] == 5.0 and not row["method"].startswith("knapsack")}
    assert len(same) == 1
    assert all(row["bits"] <= max(same) for row in found["rows"] if row["method"].startswith("knapsack"))
    assert all(row["planned"] == row["measured"] for row in found["memory"])
    assert "random: mean - 2 sd" in done.stderr
