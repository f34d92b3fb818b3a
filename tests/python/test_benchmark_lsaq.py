"""benchmarks/lsaq.py runs on a small model, and a second run computes nothing again; the figures belong to no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from importance_samples import add_tokenizer, save_model, write_words
from qtale.report import Results

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lsaq.py"


def test_it_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = add_tokenizer(save_model(tmp_path / "model", tie_word_embeddings=True, intermediate_size=128))
    text = write_words(tmp_path / "wikitext2" / "wiki.test.raw", 80, 8, seed=1)
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
