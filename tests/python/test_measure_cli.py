"""``qtale measure`` and ``qtale.measure``: text in, importance.json out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import qtale
from importance_samples import LAYERS, add_tokenizer, save_model, some_tokens, write_words
from qtale.checkpoint import fingerprint
from qtale.cli.main import main
from qtale.errors import CheckpointError, InputError, NetworkError
from qtale.integrations import calibration

SMALL = ["--num-sequences", "3", "--seq-len", "8", "--top-k", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(save_model(tmp_path_factory.mktemp("cli") / "llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "calibration.txt")


def test_the_command_writes_what_the_function_returns(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "importance.json"
    assert main(["measure", str(model), "-o", str(out), "--calibration", str(text), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:4] == ["layer", "jaccard", "lim", "bi"]
    assert "3 sequences of 8 tokens, seed 0" in shown
    value = json.loads(out.read_text())
    options = qtale.MeasureOptions(num_sequences=3, seq_len=8, top_k=5)
    importance = qtale.measure(model, options, calibration=text, progress=False)
    assert value == json.loads(json.dumps(importance.to_json()))
    assert value["format"] == "qtale.importance"
    assert value["model"] == {
        "fingerprint": fingerprint(model),
        "path": str(model),
        "model_type": "llama",
        "num_layers": LAYERS,
    }
    assert value["data"]["source"] == str(text)
    assert value["settings"]["top_k"] == 5
    assert np.shape(value["token_sets"]) == (3, LAYERS + 1, 5)
    assert np.shape(value["per_sequence"]["jaccard"]) == (3, LAYERS)
    numbers = {str(number) for number in np.ravel(value["token_sets"])}
    assert value["words"] == {number: f"w{number}" if number != "0" else "[UNK]" for number in numbers}


def test_json_leaves_the_sets_to_the_file(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", str(model), "-o", str(tmp_path / "a.json"), "--calibration", str(text), *SMALL, "--json"]
    assert main([*command, "--metrics", "all", "--loss-sequences", "2", "--resume", str(tmp_path / "state")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["out"] == str(tmp_path / "a.json")
    assert set(shown["scores"]) == {"jaccard", "lim", "bi", "zd", "error", "random", "fisher", "noise", "kl"}
    assert "token_sets" not in shown
    assert (tmp_path / "state" / "journal.json").is_file()


def test_sequences_are_windows_of_the_text_and_depend_on_the_seed(model: Path, text: Path) -> None:
    drawn = [calibration.calibrate(model, text, 4, 10, seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0].tokens, drawn[1].tokens)
    assert not np.array_equal(drawn[0].tokens, drawn[2].tokens)
    assert drawn[0].tokens.shape == (4, 10)
    rows = [[int(word[1:]) for word in line.split()] for line in text.read_text().split("\n\n")]
    pairs = {pair for row in rows for pair in itertools.pairwise(row)}
    inside = [pair in pairs for window in drawn[0].tokens.tolist() for pair in itertools.pairwise(window)]
    # Lines of six tokens are shuffled, so two of the nine pairs of a window may join lines.
    assert np.mean(inside) >= 7 / 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num-sequences", "40"], "has 240 tokens, but 40 sequences of 8 need 320; take a longer text"),
        (["--num-sequences", "0"], "num_sequences 0 must be"),
        (["--seq-len", "500"], "has 240 tokens, but 3 sequences of 500 need 1500"),
        (["--top-k", "97"], "top_k 97 is more than the 96 tokens"),
        (["--metrics", "jaccard,best"], "metrics names 'best'"),
        (["--group-size", "rows"], "group_size 'rows' is not supported"),
        (["--max-memory", "much"], "--max-memory 'much' is no size"),
        (["--calibration", "none.txt"], "none.txt: cannot be read: No such file or directory; give a text file"),
    ],
)
def test_wrong_options_are_one_sentence_and_write_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    out = tmp_path / "importance.json"
    assert main(["measure", str(model), "-o", str(out), "--calibration", str(text), *SMALL, *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("qtale: error: ")
    assert shown.err.count("\n") == 1
    assert sentence in shown.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "importance.json"
    out.write_text("mine")
    assert main(["measure", str(model), "-o", str(out), "--calibration", str(text), *SMALL]) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_tokens_may_be_given_and_a_tokenizer_must_be_there(tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare")
    options = qtale.MeasureOptions(metrics=("jaccard",), top_k=3)
    importance = qtale.measure(bare, options, tokens=some_tokens(2), out=tmp_path / "a.json", progress=False)
    assert importance.words == {}
    assert importance.data["source"] == "tokens"
    assert (tmp_path / "a.json").is_file()
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        qtale.measure(bare, options, calibration=tmp_path / "a.json", progress=False)


def test_bundled_passages_and_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boolq").mkdir()
    passages = [{"passage": " ".join(f"w{n % 90 + 1}" for n in range(row, row + 12))} for row in (0, 0, 20, 40)]
    (tmp_path / "boolq" / "validation.jsonl").write_text("\n".join(map(json.dumps, passages)))
    monkeypatch.setattr("qtale.demo.tasks", lambda: tmp_path)
    drawn = calibration.calibrate(model, "bundled", 3, 12, 0)
    assert drawn.data == {"source": "bundled", "documents": 3, "num_sequences": 3, "seq_len": 12}
    assert sorted(row[0] for row in drawn.tokens.tolist()) == [1, 21, 41]

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": ["", "w1 w2 w3 w4", "w5 w6 w7 w8"]})
    assert sorted(calibration.calibrate(model, "hub", 2, 4, 0).tokens[:, 0].tolist()) == [1, 5]

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(NetworkError, match="use the calibration 'bundled', which needs no hub"):
        calibration.calibrate(model, "hub", 2, 4, 0)


def test_text_that_is_no_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no UTF-8 text"):
        calibration.calibrate(model, tmp_path / "bytes", 1, 4, 0)
