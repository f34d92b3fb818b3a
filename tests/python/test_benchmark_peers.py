"""Packages beside the engine: their scripts are called as they expect, on models made once; none is installed here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from qtale import _core
from qtale.checkpoint.folder import open_folder
from qtale.engine.spec import read_spec
from qtale.errors import Error

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import peers  # noqa: E402
import random_models  # noqa: E402
from peer_packages import PACKAGES, shape_of  # noqa: E402

TINY = read_spec(random_models.TINY.config(), "tiny")
FAKE = """#!{python}
import json, pathlib, sys
script, what, folder, *rest = sys.argv[1:]
assert pathlib.Path(script).is_file()
with open("{calls}", "a") as calls:
    print(json.dumps([what, *rest]), file=calls)
if what == "make":
    assert not rest[0].startswith("/") or (pathlib.Path(rest[0]) / "model.safetensors").is_file()
    pathlib.Path(folder).mkdir()
else:
    assert pathlib.Path(folder).is_dir()
print("a remark")
print({{"make": "made", "bytes": 1000, "prefill": 50.5, "decode": 20.25}}[what])
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    program = tmp_path / "python"
    program.write_text(FAKE.format(python=sys.executable, calls=tmp_path / "calls"))
    program.chmod(0o755)
    return program


def calls(python: Path) -> list[list[str]]:
    return [json.loads(line) for line in (python.parent / "calls").read_text().splitlines()]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_makes_its_model_once_and_measures(
    name: str, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MEMORY", 4 << 20)
    threads = _core.num_threads()
    peer = PACKAGES[name](python, TINY, tmp_path)
    assert PACKAGES[name](python, TINY, tmp_path) == peer
    row = peers.measure(peer, threads, 8, 4, 1)
    assert [call[0] for call in calls(python)] == ["make", "prefill", "decode", "bytes"]
    assert calls(python)[1:3] == [["prefill", "8", f"{threads}", "1"], ["decode", "4", f"{threads}", "1"]]
    assert (row["prefill"]["tokens_per_second"], row["decode"]["tokens_per_second"]) == (50.5, 20.25)
    assert row["bytes_per_token"] == 1000
    assert peer.name in peers.line(row)
    assert {path.name for path in tmp_path.iterdir()} == {"python", "calls", peer.model.name}


def test_names_tell_the_bits_by_which_peers_are_chosen(python: Path, tmp_path: Path) -> None:
    names = {name: PACKAGES[name](python, TINY, tmp_path).name for name in PACKAGES}
    assert {name for name, title in names.items() if "4" in title} == {"openvino", "onnxruntime"}
    assert {name for name, title in names.items() if "8" in title} == set(names) - {"openvino", "onnxruntime"}
    made = [call[1:] for call in calls(python) if call[0] == "make"]
    assert sorted(call[1] for call in made if len(call) == 2) == ["4", "4", "8", "8"]


def test_a_package_that_fails_is_named(python: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="OpenVINO int4 did not run"):
        PACKAGES["openvino"](tmp_path / "none", TINY, tmp_path)
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('a remark\\nno such package')\n")
    with pytest.raises(Error, match="onnxruntime-genai int8 failed with status 1: no such package"):
        PACKAGES["onnxruntime-int8"](python, TINY, tmp_path)


def test_packages_are_chosen_by_name() -> None:
    options = argparse.Namespace(cache=None, llama_cpp=None, ik=None, kinds="Q4_0", package=["openvino=/a/python"])
    assert peers.choice_of(options).packages == (("openvino", Path("/a/python")),)
    options.package = ["other=/a/python"]
    with pytest.raises(Error, match="openvino-int8, onnxruntime"):
        peers.choice_of(options)


def test_without_file_types_nothing_is_built(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.peer_builds, "llama_cpp", pytest.fail)
    packages = [f"openvino={python}", f"onnxruntime={tmp_path / 'none'}"]
    options = argparse.Namespace(cache=None, llama_cpp=None, ik=None, kinds="", package=packages)
    found = peers.peers("tiny", peers.choice_of(options), tmp_path)
    assert [peer.name for peer in found] == ["OpenVINO int4"]
    assert "onnxruntime: not measured: onnxruntime-genai int4 did not run" in capsys.readouterr().err


def test_dense_folders_are_those_of_transformers(tmp_path: Path) -> None:
    folder = open_folder(random_models.write_dense(tmp_path / "dense", random_models.TINY))
    assert shape_of(read_spec(folder.config, "dense")) == random_models.TINY
    tokenizer = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == random_models.TINY.vocab
    for name, size in random_models.TINY.matrices():
        values = folder.numpy(f"{name}.weight")
        assert values.shape == size
        assert 0.019 < float(np.std(values.astype(np.float32))) < 0.021
