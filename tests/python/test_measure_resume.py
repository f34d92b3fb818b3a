"""A measurement that was killed goes on where it stopped and gives the same file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from importance_samples import LAYERS, save_model, some_tokens
from qtale import MeasureOptions
from qtale.errors import InputError
from qtale.importance import METRICS, measure_tokens
from qtale.importance.journal import Journal

OPTIONS = MeasureOptions(metrics=METRICS, top_k=8, loss_sequences=2)
# Kills its own process after the journal was saved a given number of times, or just before that.
CHILD = """
import os, signal, sys
import numpy as np
from qtale import MeasureOptions
from qtale.importance import METRICS, journal, measure_tokens

model, tokens, resume, saves, moment = sys.argv[1:]
written = journal.Journal._write
left = [int(saves)]
def counted(self, path):
    left[0] -= 1
    if not left[0] and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    written(self, path)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal._write = counted
options = MeasureOptions(metrics=METRICS, top_k=8, loss_sequences=2)
measure_tokens(model, np.load(tokens), options, resume=resume, progress=False)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("resume") / "llama")


def killed(model: Path, folder: Path, saves: int, moment: str) -> None:
    import numpy as np

    np.save(folder / "tokens.npy", some_tokens())
    arguments = [str(model), str(folder / "tokens.npy"), str(folder / "state"), str(saves), moment]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


# The journal is saved once when made, once after the embedding, then after each layer of each pass.
@pytest.mark.parametrize(("saves", "moment"), [(2, "after"), (4, "before"), (4, "after"), (7, "before"), (10, "after")])
def test_killed_and_resumed_gives_the_same_file(model: Path, tmp_path: Path, saves: int, moment: str) -> None:
    killed(model, tmp_path, saves, moment)
    resumed = measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False)
    resumed.write(tmp_path / "resumed.json")
    measure_tokens(model, some_tokens(), OPTIONS, progress=False).write(tmp_path / "straight.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_finished_layers_are_not_run_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(model, tmp_path, 4, "after")
    from qtale.importance.layered import LayeredModel

    original, run = LayeredModel.layer, []
    monkeypatch.setattr(LayeredModel, "layer", lambda self, index: run.append(index) or original(self, index))
    options = MeasureOptions(metrics=("jaccard",))
    measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False)
    assert run[: LAYERS - 2] == list(range(2, LAYERS))
    run.clear()
    measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False)
    assert run == []
    with pytest.raises(InputError, match="belongs to a measurement with another settings"):
        measure_tokens(model, some_tokens(), options, resume=tmp_path / "state", progress=False)


def test_a_finished_folder_keeps_the_journal_only(model: Path, tmp_path: Path) -> None:
    measure_tokens(model, some_tokens(), OPTIONS, resume=tmp_path / "state", progress=False)
    assert [path.name for path in (tmp_path / "state").iterdir() if path.suffix] == ["journal.json"]


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
    import filelock

    state = tmp_path / "state"
    state.mkdir()
    with filelock.FileLock(state / ".lock"), pytest.raises(InputError, match="another measurement runs in it"):
        measure_tokens(model, some_tokens(), OPTIONS, resume=state, progress=False)


def test_the_journal_is_whole_at_all_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, {"model": "a"})
    journal.save("one", [1])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match="cannot be written: No space left"):
        journal.save("two", [2])
    assert json.loads((tmp_path / "journal.json").read_text())["entries"] == {"one": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]
