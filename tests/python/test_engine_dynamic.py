"""Dynamic rotary scaling beyond the positions of the plain form: a text's keys go by its whole length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qtale
from engine_samples import difference, ids_of, make_model, save_model, torch_logits
from qtale.engine import Engine

POSITIONS = 64
BOUND = 1e-4
LENGTHS = (300, 40, 65, 700, 64, 150)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return make_model("llama", rope_parameters=rope, max_position_embeddings=POSITIONS)


@pytest.fixture
def engine(model: torch.nn.Module, tmp_path: Path) -> Engine:
    return qtale.load(save_model(model, tmp_path / "model", tokenizer=False), context=1024, progress=False)


def expected(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    # transformers keeps the base of the longest text until a short one resets it.
    torch_logits(model, [1])
    return torch_logits(model, ids)


@pytest.mark.parametrize("pass_tokens", [512, 48])
def test_long_texts_in_parts_give_the_logits_of_transformers(
    model: torch.nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr("qtale.engine.engine.PASS_TOKENS", pass_tokens)
    for length in LENGTHS:
        ids = ids_of(length, seed=length)
        assert difference(engine.logits(ids), expected(model, ids)) < BOUND


def test_a_prompt_in_a_batch_is_read_as_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtale.engine.generate.PASS_TOKENS", 100)
    batch = [ids_of(length, seed=length) for length in LENGTHS]
    together = engine.generate(batch, max_new_tokens=3, ignore_end=True)
    assert [each.tokens for each in together] == [
        engine.generate(ids, max_new_tokens=3, ignore_end=True).tokens for ids in batch
    ]


def test_scores_are_those_of_the_whole_text(model: torch.nn.Module, engine: Engine) -> None:
    context = ids_of(90)
    pairs = [(context, [3, 4]), (context, [5]), (context[:50], context[50:80]), (context[:20], [7, 8])]
    for (before, after), (found, _) in zip(pairs, engine.loglikelihood(pairs), strict=True):
        logits = torch.tensor(expected(model, (before + after)[:-1])).double().log_softmax(-1)
        rows = range(len(before) - 1, len(before) + len(after) - 1)
        total = sum(float(logits[row, token]) for row, token in zip(rows, after, strict=True))
        assert found == pytest.approx(total, abs=1e-3)


def test_a_session_reads_anew_what_a_longer_text_changes(engine: Engine) -> None:
    text = ids_of(200)
    with engine.session() as session:
        for length, reused in ((40, False), (60, True), (100, False), (200, False), (50, False)):
            list(session.stream(text[:length], max_new_tokens=3))
            assert (session.reused > 0) == reused
            assert session.last is not None
            assert session.last.tokens == engine.generate(text[:length], max_new_tokens=3).tokens


@pytest.mark.parametrize("length", [20, 62, 100])
def test_generated_tokens_are_those_of_transformers(model: torch.nn.Module, engine: Engine, length: int) -> None:
    ids, steps = ids_of(length, seed=length), 30
    torch_logits(model, [1])
    given = torch.tensor([ids])
    with torch.no_grad():
        found = model.generate(  # type: ignore[operator]
            given, attention_mask=torch.ones_like(given), max_new_tokens=steps, do_sample=False, eos_token_id=None
        )
    assert engine.generate(ids, max_new_tokens=steps, ignore_end=True).tokens == tuple(found[0, length:].tolist())


def test_equal_long_texts_run_once(engine: Engine) -> None:
    context = ids_of(90)
    engine.loglikelihood([(context, [token]) for token in (3, 4, 5)])
    assert engine.report.tokens == len(context)
