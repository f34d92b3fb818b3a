"""Memory of loading: what does not fit is told before weights are read, and what fits peaks where it is said to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale.checkpoint.folder import open_folder
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.spec import read_spec
from qtale.errors import Error
from qtale.memory import host

OPTIONS: dict[str, dict[str, Any]] = {"dense": {}, "rounded": {"bits": 4}, "packed": {}}
# 28 million weights: 57 MB in 16 bits, 21 MB in 4.
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
SHARD = 16_000_000
# Stacks of threads, tables of the decoder, and what is left free between the two.
SLACK = 3 << 20
SCRIPT = """
import ctypes, gc, json, sys

PR_SET_THP_DISABLE = 41
if ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
    sys.exit("prctl refuses PR_SET_THP_DISABLE")

import qtale

def status(field):
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(fields[1]) << 10 for fields in lines if fields[0] == field + ":")

warm, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
qtale.load(warm, progress=False, **options).close()  # code of libraries is there before anything is measured
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmHWM")
engine = qtale.load(folder, progress=False, **options)
print(json.dumps({"grown": status("VmHWM") - before, "weights": engine.load_report.weights_bytes}))
"""


def folders(root: Path, **options: Any) -> dict[str, Path]:
    """The same model dense and quantized."""
    model = make_model("llama", **{"initializer_range": 0.02, **options.pop("sizes", {})})
    dense = save_model(model.half(), root / "dense", tokenizer=False, **options)
    qtale.quantize(dense, root / "packed", qtale.QuantSpec(4), progress=False)
    return {"dense": dense, "rounded": dense, "packed": root / "packed"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("large"), sizes=SIZES, max_shard_size=SHARD)


def stored(folder: Path) -> list[int]:
    """Bytes of each file of weights."""
    return [path.stat().st_size for path in folder.glob("*.safetensors")]


def needed_by(folder: Path, bits: int | None = None) -> int:
    opened = open_folder(folder)
    quantize = None if bits is None else qtale.QuantSpec(bits)
    layout = plan_layout(opened, read_spec(opened.config, "folder"), WeightOptions(quantize))
    return layout.nbytes + layout.workspace


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, options = small[name], OPTIONS[name]
    with qtale.load(folder, cache=tmp_path, progress=False, **options) as engine:
        expected = engine.logits(ids_of(9)).tolist()
    free = needed_by(folder, **options)
    monkeypatch.setattr(host, "_groups", lambda _: iter(()))
    monkeypatch.setattr(host, "meminfo", lambda *_: {"MemAvailable": free})
    # Just enough; a cache is read in place of the folder, and takes as much.
    for cache in (None, tmp_path):
        with qtale.load(folder, cache=cache, progress=False, **options) as engine:
            assert engine.logits(ids_of(9)).tolist() == expected
    free -= 1
    monkeypatch.setattr("qtale.engine.model.Arena", lambda *_: pytest.fail("memory was taken"))
    monkeypatch.setattr("qtale.engine.weights.fill_block", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("qtale.engine.cache.PackedCache.read", lambda *_: pytest.fail("the cache was read"))
    for cache in (None, tmp_path):
        with pytest.raises(Error, match=rf"{folder.name}: its weights take .* are free; quantize it to fewer bits"):
            qtale.load(folder, cache=cache, progress=False, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_loading_peaks_at_the_weights_and_one_shard(small: dict[str, Path], large: dict[str, Path], name: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the memory of a process from Linux' /proc")
    shards = stored(large[name])
    assert len(stored(large["dense"])) >= 4
    command = [sys.executable, "-c", SCRIPT, str(small[name]), str(large[name]), json.dumps(OPTIONS[name])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr or "PR_SET_THP_DISABLE" in run.stderr:
        pytest.skip("this kernel does not reset the peak of a process, or take huge pages from it")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    kept = sum(stored(large["dense" if name == "dense" else "packed"]))
    assert found["weights"] == pytest.approx(kept, rel=0.03)
    assert kept * 0.95 < found["grown"] < kept + max(shards) + SLACK
    # What it says it needs: one block of weights beside the arena.
    assert found["grown"] < needed_by(large[name], **OPTIONS[name]) + SLACK
