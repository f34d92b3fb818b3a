"""The benchmarks of measure run, and count what they say they count; how fast anything is belongs to no test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from importance_samples import save_model, some_tokens
from qtale import MeasureOptions
from qtale.importance import measure_tokens

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stability() -> ModuleType:
    spec = importlib.util.spec_from_file_location("importance_stability", FOLDER / "importance_stability.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # as Python does for a script
        spec.loader.exec_module(module)
    return module


def test_kendall(stability: ModuleType) -> None:
    order = np.arange(4.0)
    assert stability.kendall(order, order) == 1
    assert stability.kendall(order, -order) == -1
    assert stability.kendall(order, np.array([0.0, 1, 3, 2])) == pytest.approx(4 / 6)
    # Five pairs agree and one is tied in the second list.
    assert stability.kendall(order, np.array([0.0, 1, 2, 2])) == pytest.approx(5 / np.sqrt(6 * 5))


def test_smaller_sets_are_a_part_of_larger_ones(stability: ModuleType, tmp_path: Path) -> None:
    model, tokens = save_model(tmp_path / "llama"), some_tokens()
    large, small = (
        measure_tokens(model, tokens, MeasureOptions(metrics=("jaccard",), top_k=k), progress=False) for k in (20, 5)
    )
    assert stability.jaccard(large, 5).tolist() == pytest.approx(small.scores["jaccard"], rel=1e-12)


def test_measure_and_transformers_agree(tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama", vocab_size=600)
    np.save(tmp_path / "tokens.npy", some_tokens(3))
    found = {}
    for way in ("qtale", "transformers"):
        command = [sys.executable, str(FOLDER / "importance_measure.py"), "--way", way, "--threads", "1"]
        command += ["--model", str(model), "--tokens", str(tmp_path / "tokens.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout)
    for metric, scores in found["transformers"]["scores"].items():
        assert found["qtale"]["scores"][metric] == pytest.approx(scores, abs=1e-5), metric
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 1 << 20 for one in found.values())
