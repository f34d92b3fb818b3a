"""What measure refuses, and in which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from importance_samples import LAYERS, VOCAB, save_model, some_tokens
from qtale import MeasureOptions
from qtale.checkpoint import fingerprint
from qtale.errors import CheckpointError, Error, InputError, UnsupportedError
from qtale.importance import Importance, measure_tokens

CHEAP = MeasureOptions(metrics=("bi", "random"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("refusals") / "llama")


@pytest.fixture(scope="module")
def importance(model: Path) -> Importance:
    return measure_tokens(model, some_tokens(), CHEAP, progress=False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"metrics": ()}, "metrics names nothing; use some of jaccard"),
        ({"metrics": ("jaccard", "shapley")}, "metrics names 'shapley'"),
        ({"metrics": ("bi", "bi")}, "names one of them twice"),
        ({"num_sequences": 0}, "num_sequences 0 must be a whole number of at least 1"),
        ({"num_sequences": 1.5}, "num_sequences 1.5 must be"),
        ({"seq_len": 1}, "seq_len 1 must be a whole number of at least 2"),
        ({"top_k": 0}, "top_k 0 must be"),
        ({"matrix": "head"}, "matrix 'head' is not known; use embed or lm_head"),
        ({"norm": "rms"}, "norm 'rms' is not known"),
        ({"positions": "first"}, "positions 'first' is not known"),
        ({"zd_tail": "lower"}, "zd_tail 'lower' is not known"),
        ({"noise": 0.0}, "noise 0.0 must lie between 0 and 1"),
        ({"error_bits": 5}, "num_bits 5 is not supported"),
        ({"group_size": 48}, "group_size 48 is not supported"),
    ],
)
def test_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence.replace(".", r"\.").replace("(", r"\(")):
        MeasureOptions(**settings)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([], "no calibration sequence is given"),
        ([[1, 2, 3], [1, 2]], "sequence 1 has 2 tokens; all must have the same number"),
        ([[1], [2]], "sequence 0 has 1 tokens"),
        ([[1.0, 2.0]], "sequence 0 must be a row of whole token numbers"),
        (np.zeros((2, 3, 4), int), "sequence 0 must be a row"),
        ([[0, -1]], "token numbers reach from -1 to 0"),
        ([[0, VOCAB]], f"but the model has {VOCAB};"),
    ],
)
def test_tokens(model: Path, tokens: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        measure_tokens(model, tokens, CHEAP, progress=False)


def test_more_tokens_in_a_set_than_in_the_vocabulary(model: Path) -> None:
    options = MeasureOptions(metrics=("jaccard",), top_k=VOCAB + 1)
    with pytest.raises(InputError, match=f"top_k {VOCAB + 1} is more than the {VOCAB} tokens of the vocabulary"):
        measure_tokens(model, some_tokens(), options, progress=False)


def edited(folder: Path, name: str, value: torch.Tensor) -> Path:
    tensors = load_file(save_model(folder) / "model.safetensors")
    save_file({**tensors, name: value}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_hidden_states_that_are_not_finite(tmp_path: Path) -> None:
    path = edited(tmp_path / "nan", "model.layers.1.mlp.down_proj.weight", torch.full((64, 96), torch.nan))
    with pytest.raises(CheckpointError, match="layer 1 gives NaN or infinite hidden states for sequence 0"):
        measure_tokens(path, some_tokens(), CHEAP, progress=False)
    embedding = torch.randn(VOCAB, 64)
    embedding[7] = torch.inf
    path = edited(tmp_path / "inf", "model.embed_tokens.weight", embedding)
    tokens = np.full((3, 4), 5)
    tokens[2, 1] = 7
    with pytest.raises(CheckpointError, match="the embedding gives NaN or infinite hidden states for sequence 2"):
        measure_tokens(path, tokens, CHEAP, progress=False)


def test_quantized_models_and_integer_weights(tmp_path: Path, model: Path) -> None:
    quantized = save_model(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match="is quantized already; take the dense model"):
        measure_tokens(quantized, some_tokens(), CHEAP, progress=False)
    path = edited(tmp_path / "integers", "model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64, dtype=torch.int8))
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight has dtype I8"):
        measure_tokens(path, some_tokens(), CHEAP, progress=False)


def test_one_sequence_has_scores_but_no_spread(model: Path, importance: Importance) -> None:
    one = measure_tokens(model, some_tokens(1), CHEAP, progress=False)
    assert len(one.scores["bi"]) == LAYERS
    with pytest.raises(InputError, match="one sequence has no spread"):
        one.spread("bi")
    with pytest.raises(InputError, match="'random' is not a mean over sequences"):
        importance.spread("random")
    with pytest.raises(InputError, match="has no scores by 'lim'; it has bi, random"):
        importance.ranking("lim")
    rows = np.array(importance.per_sequence["bi"])
    np.testing.assert_allclose(importance.spread("bi"), rows.std(0, ddof=1) / 2)


def test_the_file_reads_back_and_knows_its_model(model: Path, importance: Importance, tmp_path: Path) -> None:
    importance.write(tmp_path / "importance.json")
    found = Importance.read(tmp_path / "importance.json")
    assert found.to_json() == json.loads((tmp_path / "importance.json").read_text())
    assert dataclasses.replace(found, token_sets=importance.token_sets) == importance
    found.check_model(fingerprint(model))
    other = save_model(tmp_path / "other", "olmo2")
    with pytest.raises(InputError, match="was measured on another model"):
        found.check_model(fingerprint(other))
    with pytest.raises(InputError, match="exists already"):
        importance.write(tmp_path / "importance.json")
    with pytest.raises(InputError, match="does not exist; create it first"):
        importance.write(tmp_path / "none" / "importance.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "qtale.plan"}, "is no measurement"),
        ({"version": 2}, "has version 2; this qtale reads version 1"),
        ({"model": {"num_layers": 3}}, "'model' must name a fingerprint"),
        ({"scores": {}}, "has no 'scores'"),
        ({"scores": {"bi": [1.0]}}, "scores by 'bi' must be a list of 3 numbers"),
        ({"scores": {"bi": [1.0, 2.0, None]}}, "must be finite numbers"),
        ({"scores": {"bi": [1.0, 2.0, float("nan")]}}, "must be finite numbers"),
        ({"errors": []}, "'errors' must be a JSON object"),
    ],
)
def test_broken_files(importance: Importance, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "importance.json"
    path.write_text(json.dumps({**importance.to_json(), **changes}))
    with pytest.raises(InputError, match=sentence) as raised:
        Importance.read(path)
    assert str(path) in str(raised.value)


def test_missing_files_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make it with `qtale measure`"):
        Importance.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("layers")
    with pytest.raises(InputError, match="is not valid JSON"):
        Importance.read(tmp_path / "text.json")


def test_a_full_disk_is_a_sentence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Error, match="has 1000 free; set TMPDIR to a larger disk"):
        measure_tokens(model, some_tokens(), CHEAP, max_memory=0, progress=False)
