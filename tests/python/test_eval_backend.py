"""``--backend auto|engine|torch``: which of the two ways to run scores a model, and what each refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qtale
from eval_samples import byte_tokenizer, write_documents, write_model
from qtale.errors import InputError, UnsupportedError
from qtale.eval import EvalOptions, evaluate
from qtale.eval.backend import engine_lm
from qtale.integrations.engine_lm import EngineLM
from qtale.spec import QuantSpec

# What the engine does not do though it runs the model, and the words that say so.
TORCH_ONLY = [
    ({"device": "cuda"}, "the engine computes on the CPU, not on 'cuda'"),
    ({"dtype": "float16"}, "the engine's activations are float32, not float16"),
    ({"trust_remote_code": True}, "the engine never runs a model's own code"),
]
ENGINE_ONLY = [{"lm_head_bits": 8}, {"threads": 1}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "model", max_position_embeddings=256)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers runs and the engine does not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, initializer_range=0.15)
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "data")


def options(folder: Path, **changes: Any) -> EvalOptions:
    return EvalOptions(("arc_easy",), str(folder), **changes)


@pytest.mark.parametrize("backend", ["auto", "engine"])
@pytest.mark.parametrize("dtype", ["default", "auto", "float32"])
def test_the_engine_is_taken_where_it_runs_the_model(
    llama: Path, backend: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qtale"):
        lm = engine_lm(options(llama, backend=backend, dtype=dtype), llama, None)
    assert isinstance(lm, EngineLM)
    assert lm.engine._model is not None
    assert (lm.backend_name, lm.max_length, lm.engine._model.kv_dtype) == ("engine", 256, "float32")
    assert "PyTorch" not in caplog.text


def test_the_engine_is_loaded_as_the_options_say(llama: Path) -> None:
    changes: dict[str, Any] = {"compute": "float", "lm_head_bits": 8, "threads": 1, "max_length": 100}
    lm = engine_lm(options(llama, **changes), llama, QuantSpec(3, 32, False))
    assert isinstance(lm, EngineLM)
    assert lm.max_length == 100
    with qtale.load(
        llama, compute="float", bits=3, group_size=32, symmetric=False, lm_head_bits=8, kv_dtype="float32"
    ) as plain:
        tokens = list(range(1, 90))
        assert (lm.engine.logits(tokens) == plain.logits(tokens)).all()
    model = lm.engine._model
    assert model is not None
    assert model.options.num_threads == 1


def test_auto_takes_torch_where_the_engine_refuses_the_model(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qtale"):
        assert engine_lm(options(gpt2), gpt2, None) is None
    (record,) = caplog.records
    assert "eval: PyTorch scores this model; " in record.getMessage()
    assert "has the model_type 'gpt2'; the engine runs llama" in record.getMessage()


@pytest.mark.parametrize(("changes", "reason"), TORCH_ONLY)
def test_auto_takes_torch_for_what_only_it_does(
    llama: Path, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qtale"):
        assert engine_lm(options(llama, **changes), llama, None) is None
    assert [f"eval: PyTorch scores this model; {reason}." == record.getMessage() for record in caplog.records] == [True]


def test_the_engine_refuses_a_model_that_it_does_not_run(gpt2: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^--backend engine: .*has the model_type 'gpt2'"):
        engine_lm(options(gpt2, backend="engine"), gpt2, None)


@pytest.mark.parametrize(("changes", "reason"), TORCH_ONLY)
def test_the_engine_refuses_what_only_torch_does(llama: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^--backend engine: {reason}"):
        engine_lm(options(llama, backend="engine", **changes), llama, None)


def test_torch_is_taken_where_it_is_asked_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtale, "load", lambda *_, **__: pytest.fail("the engine was loaded"), raising=False)
    assert engine_lm(options(llama, backend="torch"), llama, None) is None


@pytest.mark.parametrize("changes", ENGINE_ONLY)
def test_options_of_the_engine_are_refused_where_torch_scores(llama: Path, gpt2: Path, changes: dict[str, Any]) -> None:
    message = "--lm-head-bits, --threads: are options of the engine, but PyTorch scores this model"
    for folder, other in ((llama, {"backend": "torch"}), (llama, {"dtype": "float16"}), (gpt2, {})):
        with pytest.raises(InputError, match=message):
            engine_lm(options(folder, **other, **changes), folder, None)


@pytest.mark.parametrize("backend", ["auto", "engine"])
def test_what_is_wrong_in_the_options_is_told_and_not_left_to_torch(llama: Path, backend: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_length 300: the engine's context holds 256 tokens"):
        engine_lm(options(llama, backend=backend, max_length=300), llama, None)
    qtale.quantize(llama, tmp_path / "packed", QuantSpec(4), progress=False)
    with pytest.raises(InputError, match="quantized already"):
        engine_lm(options(tmp_path / "packed", backend=backend), tmp_path / "packed", QuantSpec(4))


def test_a_backend_that_is_not_known_is_named(llama: Path) -> None:
    with pytest.raises(InputError, match="--backend 'cuda': is not known; use auto, engine, torch"):
        options(llama, backend="cuda")


@pytest.mark.parametrize("spec", [None, QuantSpec(4, 32)])
def test_results_name_the_backend_and_are_alike_on_both(
    llama: Path, documents: Path, tmp_path: Path, spec: QuantSpec | None
) -> None:
    found = {}
    for backend in ("auto", "torch"):
        changes: dict[str, Any] = {"spec": spec, "compute": "float", "data": str(documents), "log_samples": True}
        found[backend] = evaluate(options(llama, backend=backend, output_path=tmp_path / backend, **changes))
    assert [found[name].results["qtale"]["backend"] for name in ("auto", "torch")] == ["engine", "torch"]
    assert found["auto"].results["results"] == found["torch"].results["results"]
    answers = {name: [row["filtered_resps"] for row in (found[name].samples or {})["arc_easy"]] for name in found}
    for ours, theirs in zip(answers["auto"], answers["torch"], strict=True):
        assert [float(value) for value, _ in ours] == pytest.approx([float(value) for value, _ in theirs], rel=1e-4)
        assert [str(greedy) for _, greedy in ours] == [str(greedy) for _, greedy in theirs]


def test_a_model_that_the_engine_refuses_is_scored_by_torch(gpt2: Path, documents: Path) -> None:
    outcome = evaluate(options(gpt2, data=str(documents)))
    assert outcome.results["qtale"]["backend"] == "torch"
    assert 0 <= outcome.results["results"]["arc_easy"]["acc,none"] <= 1
