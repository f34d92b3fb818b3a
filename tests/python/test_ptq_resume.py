"""A calibrated quantization that was killed goes on where it stopped and writes the same files."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qtale
from importance_samples import save_model, some_tokens
from qtale import QuantSpec, SolverOptions
from qtale.errors import CheckpointError, Error, InputError
from qtale.layerwise.journal import Journal
from qtale.ptq import tune, tuning_state
from qtale.ptq.solved import SolvedLayers

# CI kills fewer times; the whole check is QTALE_KILLS=50.
KILLS = int(os.environ.get("QTALE_KILLS", "6"))
OPTIONS = SolverOptions("auto", tune_steps=5)
SPEC = QuantSpec(3, 32)
# Kills itself after so many writes to a file that the resumed run depends on, in the middle of the next one.
CHILD = """
import os, signal, sys
import numpy as np
import qtale
from qtale import QuantSpec, SolverOptions
from qtale.ptq import tuning_state
import builtins, pathlib

tuning_state.EVERY = 2

left = [int(sys.argv[3])]
def counted(function):
    def call(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
pathlib.Path.replace = counted(pathlib.Path.replace)
pathlib.Path.unlink = counted(pathlib.Path.unlink)
os.fsync = counted(os.fsync)
qtale.quantize(sys.argv[1], sys.argv[2], QuantSpec(3, 32), method=SolverOptions("auto", tune_steps=5),
               tokens=np.load("tokens.npy"), resume="state", progress=False)
print(left[0])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("resume") / "llama")


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(model, tmp_path_factory.mktemp("straight") / "out")


def run(model: Path, out: Path, options: SolverOptions = OPTIONS, **settings: Any) -> bytes:
    tokens = settings.pop("tokens", some_tokens())
    qtale.quantize(model, out, SPEC, method=options, tokens=tokens, progress=False, **settings)
    return (out / "model.safetensors").read_bytes() + (out / "config.json").read_bytes()


def child(model: Path, folder: Path, writes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(model), str(folder / "out"), str(writes)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_random_kills_leave_no_trace(model: Path, straight: bytes, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", some_tokens())
    whole = child(model, tmp_path, 1 << 20)
    assert whole.returncode == 0, whole.stderr
    writes = (1 << 20) - int(whole.stdout)
    draw = random.Random(0)
    for _ in range(KILLS):
        shutil.rmtree(tmp_path / "state")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for _ in range(2):  # killed once, and again while it resumes
            done = child(model, tmp_path, draw.randrange(writes))
            assert done.returncode in (-signal.SIGKILL, 0), done.stderr
            if (tmp_path / "out").exists():
                break
        if not (tmp_path / "out").exists():
            run(model, tmp_path / "out", resume=tmp_path / "state")
        found = (tmp_path / "out" / "model.safetensors").read_bytes() + (tmp_path / "out" / "config.json").read_bytes()
        assert found == straight


def test_other_settings_are_refused(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", resume=tmp_path / "state")
    other = dataclasses.replace(OPTIONS, damp=0.02)
    with pytest.raises(InputError, match="belongs to a run with another damp"):
        run(model, tmp_path / "b", other, resume=tmp_path / "state")
    with pytest.raises(InputError, match="belongs to a run with another calibration"):
        run(model, tmp_path / "b", tokens=some_tokens(seed=1), resume=tmp_path / "state")
    with pytest.raises(InputError, match="belongs to a run with another bits and groups"):
        qtale.quantize(
            model, tmp_path / "b", QuantSpec(4, 32), method=OPTIONS, tokens=some_tokens(), resume=tmp_path / "state"
        )
    assert not (tmp_path / "b").exists()


def test_a_finished_run_writes_its_folder_again(model: Path, straight: bytes, tmp_path: Path) -> None:
    run(model, tmp_path / "a", resume=tmp_path / "state")
    assert run(model, tmp_path / "b", resume=tmp_path / "state") == straight


def test_damaged_state_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Journal.save

    def stop(self: Journal, name: str, value: Any) -> None:
        original(self, name, value)
        if name == "layers" and len(value) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", resume=tmp_path / "state")
    kept = {path: path.read_bytes() for path in (tmp_path / "state").iterdir() if path.is_file()}
    for path, content in kept.items():
        if path.suffix not in (".f32", ".safetensors"):
            continue
        if path.name.endswith("-1.f32"):
            continue  # went into a finished layer
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="damaged"):
            run(model, tmp_path / "out", resume=tmp_path / "state")
        path.write_bytes(content)
        assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", resume=tmp_path / "state")


def test_a_full_disk_leaves_nothing_half_written(
    model: Path, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SolvedLayers.write

    def full(self: SolvedLayers, name: str, tensors: Any) -> str:
        if name == "layer-1":
            raise Error(f"{self.path(name)}: cannot be written: No space left on device.")
        return original(self, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(SolvedLayers, "write", full)
        with pytest.raises(Error, match="No space left"):
            run(model, tmp_path / "out", resume=tmp_path / "state")
    assert not (tmp_path / "out").exists()
    assert run(model, tmp_path / "out", resume=tmp_path / "state") == straight


def test_layers_that_cannot_be_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Error, match=r"layer-0.safetensors: cannot be written"):
        SolvedLayers(tmp_path).write("layer-0", {"a": torch.zeros(1 << 16)})
    assert not any(tmp_path.iterdir())


def test_tuning_goes_on_where_it_was(
    model: Path, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = tune._step, []

    def step(*arguments: Any) -> float:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(tune, "_step", step)
    monkeypatch.setattr(tuning_state, "EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", resume=tmp_path / "state")
    assert run(model, tmp_path / "out", resume=tmp_path / "state") == straight
    # Three were done, of which two were kept; five are asked for.
    assert len(calls) == 4 + 3
