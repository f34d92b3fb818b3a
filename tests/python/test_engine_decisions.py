"""What a call's report tells: each token's decisions, as the dense form takes them, and the call's own caches."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import qtale
from engine_samples import ids_of
from eval_samples import tiny_llama
from qtale.engine import Engine
from qtale.nn import RoutedLayer
from test_engine_routing import LAYERS, dense, oracle_logits, prompts, routed, set_theta, theta_for

__all__ = ["dense"]


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> torch.nn.Module:
    return qtale.load_torch(routed(dense, tmp_path / "model"))


@pytest.fixture
def engine(model: torch.nn.Module, tmp_path: Path) -> Engine:
    engine = qtale.load(tmp_path / "model", progress=False)
    set_theta(engine, model, theta_for(model, 0.5))
    engine.record_decisions = True
    return engine


def oracle_decisions(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    oracle_logits(model, tokens)
    runs = np.ones((LAYERS, len(tokens)), dtype=bool)
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer, RoutedLayer):
            runs[index] = layer.executed[0].numpy()
    return runs


def of_sequence(engine: Engine, number: int) -> np.ndarray:
    """The decisions on one sequence's tokens, in the order of their positions."""
    decisions, places = engine.report.decisions, engine.report.places
    assert decisions is not None
    assert places is not None
    mine = np.flatnonzero(places[:, 0] == number)
    mine = mine[np.argsort(places[mine, 1])]
    assert places[mine, 1].tolist() == list(range(len(mine)))
    return decisions[:, mine]


@pytest.mark.parametrize("pass_tokens", [512, 16])
def test_every_decision_is_that_of_the_dense_form(
    model: torch.nn.Module, engine: Engine, monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr("qtale.engine.engine.PASS_TOKENS", pass_tokens)
    monkeypatch.setattr("qtale.engine.generate.PASS_TOKENS", pass_tokens)
    for tokens in prompts():
        engine.logits(tokens)
        assert (of_sequence(engine, 0) == oracle_decisions(model, tokens)).all()
    answers = engine.generate(prompts(), max_new_tokens=5, ignore_end=True)
    for number, (tokens, answer) in enumerate(zip(prompts(), answers, strict=True)):
        # The last token is chosen and does not run.
        assert (of_sequence(engine, number) == oracle_decisions(model, [*tokens, *answer.tokens][:-1])).all()
    decisions = engine.report.decisions
    assert decisions is not None
    assert decisions.sum(axis=1).tolist() == engine.report.executed


def test_scored_pairs_report_what_they_share_once(model: torch.nn.Module, engine: Engine) -> None:
    context, first, second = prompts()[0], [5, 6, 7], [8, 9]
    engine.loglikelihood([(context, first), (context, second)])
    beginning = of_sequence(engine, 0)
    assert (beginning == oracle_decisions(model, [*context, *first])[:, : beginning.shape[1]]).all()
    assert engine.report.tokens == len(context) + len(first) + len(second) - 2


def test_decisions_are_recorded_only_when_asked_for(engine: Engine) -> None:
    engine.record_decisions = False
    engine.logits(prompts()[0])
    assert engine.report.decisions is None
    assert engine.report.places is None
    assert engine.report.tokens == len(prompts()[0])


def test_kv_bytes_are_those_of_the_call_itself(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path)
    with qtale.load(tmp_path, progress=False) as engine:
        engine.logits(ids_of(20))
        alone = engine.report.kv_bytes
        session = engine.session()
        assert list(session.stream(ids_of(100), max_new_tokens=2))
        engine.logits(ids_of(20))
        assert engine.report.kv_bytes == alone
        assert sum(session.report.kv_bytes) > sum(alone)
        stream = engine.generate([ids_of(60)], max_new_tokens=20, stream=True, ignore_end=True)
        next(iter(stream))
        other = threading.Thread(target=engine.logits, args=(ids_of(20),))
        other.start()
        other.join()
        assert engine.report.kv_bytes == alone
        session.close()


def test_pairs_that_share_their_beginning_count_its_pages_once(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path)
    with qtale.load(tmp_path, progress=False) as engine:
        context = ids_of(120)
        engine.logits(context)
        alone = sum(engine.report.kv_bytes)
        engine.loglikelihood([(context, [number, 1]) for number in range(1, 9)])
        assert alone <= sum(engine.report.kv_bytes) < 3 * alone
