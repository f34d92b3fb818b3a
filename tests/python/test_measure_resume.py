"""A measurement that was killed goes on where it stopped and gives the same file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

from importance_samples import LAYERS, save_model, some_tokens
from qtale import MeasureOptions
from qtale.errors import Error, InputError
from qtale.importance import METRICS, Importance, measure_tokens
from qtale.layerwise.journal import Journal
from qtale.layerwise.model import LayeredModel

OPTIONS = MeasureOptions(metrics=METRICS, top_k=8, loss_sequences=2)
CHILD = """
import os, signal, sys
import numpy as np
from qtale import MeasureOptions
from qtale.importance import METRICS, measure_tokens
from qtale.layerwise import journal

written, left = journal.Journal._write, [4]
def counted(self, path):
    written(self, path)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal._write = counted
options = MeasureOptions(metrics=METRICS, top_k=8, loss_sequences=2)
measure_tokens(sys.argv[1], np.load("tokens.npy"), options, resume="state", progress=False)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("resume") / "llama")


@pytest.fixture(scope="module")
def straight(model: Path) -> Importance:
    return measure_tokens(model, some_tokens(), OPTIONS, progress=False)


def test_a_killed_process_is_resumed(model: Path, straight: Importance, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", some_tokens())
    command = [sys.executable, "-c", CHILD, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False).write(tmp_path / "a.json")
    straight.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_every_moment_of_a_run_can_be_resumed(
    model: Path, straight: Importance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, snapshots = Journal._write, []

    def snapshot(path: Path) -> None:
        snapshots.append(tmp_path / str(len(snapshots)))
        shutil.copytree(path.parent, snapshots[-1])

    def write(self: Journal, path: Path) -> None:
        snapshot(path)
        original(self, path)
        snapshot(path)

    monkeypatch.setattr(Journal, "_write", write)
    measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False)
    monkeypatch.setattr(Journal, "_write", original)
    # When made, after the embedding, and after each layer of each of the four passes.
    assert len(snapshots) == 2 * (2 + 4 * LAYERS)
    for state in snapshots:
        assert measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False) == straight
        assert [path.name for path in state.iterdir() if not path.name.startswith(".")] == ["journal.json"]


def test_finished_layers_are_not_run_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, run, original = tmp_path / "state", [], LayeredModel.layer

    def layer(self: LayeredModel, index: int):
        if len(run) == 2:
            raise KeyboardInterrupt
        run.append(index)
        return original(self, index)

    monkeypatch.setattr(LayeredModel, "layer", layer)
    options = MeasureOptions(metrics=("jaccard", "bi"), top_k=8)
    with pytest.raises(KeyboardInterrupt):
        measure_tokens(model, some_tokens(), options, resume=state, progress=False)
    assert run == [0, 1]
    run.clear()
    measure_tokens(model, some_tokens(), options, resume=state, progress=False)
    assert run == [2]
    measure_tokens(model, some_tokens(), options, resume=state, progress=False)
    assert run == [2]
    with pytest.raises(InputError, match="belongs to a run with another settings"):
        measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False)


def test_the_folder_of_another_measurement_is_refused(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False)
    with pytest.raises(InputError, match="another data"):
        measure_tokens(model, some_tokens(seed=1), OPTIONS, resume=state, progress=False)
    other = save_model(tmp_path / "other", "olmo2")
    with pytest.raises(InputError, match="another model"):
        measure_tokens(other, some_tokens(), OPTIONS, resume=state, progress=False)
    (state / "journal.json").write_text("{}")
    with pytest.raises(InputError, match="is no journal"):
        measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False)


def test_a_folder_with_other_files_or_in_use_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path, progress=False)
    state = tmp_path / "state"
    state.mkdir()
    with filelock.FileLock(state / ".lock"), pytest.raises(InputError, match="another run works in it"):
        measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False)


def test_the_journal_is_whole_at_all_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, {"model": "a"})
    journal.save("one", [1])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Error, match="cannot be written: No space left"):
        journal.save("two", [2])
    assert json.loads((tmp_path / "journal.json").read_text())["entries"] == {"one": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]
