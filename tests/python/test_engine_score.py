"""Log-likelihoods and perplexity against plain computations, and what requests share."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale.engine import Engine
from qtale.engine import score as score_module
from qtale.engine.score import _packed, _preorder, _tree
from qtale.errors import InputError

Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("llama"), tmp_path_factory.mktemp("score") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return found


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return qtale.load(folder)


def plain(model: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        logits = model(torch.tensor([(context + continuation)[:-1]])).logits[0, len(context) - 1 :].float()
    targets = torch.tensor(continuation)
    values = torch.log_softmax(logits, dim=1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(dim=1) == targets).all())


def check(model: PreTrainedModel, engine: Engine, pairs: list[Pair]) -> None:
    found = engine.loglikelihood(pairs)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        expected, best = plain(model, context, continuation)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert greedy == best
    assert not any(engine._passes.decoder.kv_bytes())


def test_requests_that_share_contexts(model: PreTrainedModel, engine: Engine) -> None:
    question = ids_of(40)
    best = list(engine.generate(question, 3, ignore_end=True).tokens)
    pairs = [
        (question, ids_of(5, seed=1)),
        (question, best),
        (question, best[:1]),
        (question, [*best[:2], 7]),
        (question[:20], question[20:25]),
        (question[:20], question[20:]),
        (question, ids_of(5, seed=1)),
        (ids_of(12, seed=2), [5]),
        ([question[0]], question[1:]),
        ([question[0]], [3]),
    ]
    check(model, engine, pairs)
    assert [greedy for _, greedy in engine.loglikelihood(pairs)][1:3] == [True, True]


def test_shared_tokens_run_once(engine: Engine) -> None:
    question = ids_of(100)
    pairs = [(question, [choice, choice + 1]) for choice in range(1, 9)]
    engine.loglikelihood(pairs)
    assert engine.report.tokens == 100 + 8
    assert engine.report.passes == 1


def test_the_bar_ends_with_what_ran(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def close(self) -> None:
            shown.append((self.total, self.n))
            super().close()

    monkeypatch.setattr(score_module, "tqdm", Bar)
    question = ids_of(100)
    engine.loglikelihood([(question, [choice, 1]) for choice in range(1, 9)], progress=True)
    assert shown[0] == (108, 108)


def test_long_requests_are_split_over_passes(
    model: PreTrainedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_module, "SCORE_TOKENS", 16)
    question = ids_of(70)
    pairs = [(question[:cut], ids_of(length, seed=cut)) for cut, length in ((30, 25), (70, 3), (70, 1), (5, 40))]
    check(model, engine, pairs)


Tokens = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(Tokens, Tokens), max_size=12))
def test_the_tree_holds_every_request_once(pairs: list[Pair]) -> None:
    roots = _tree(pairs, lambda length: False)
    edges = list(_preorder(roots))
    found: dict[int, dict[int, int]] = {index: {} for index in range(len(pairs))}
    for edge in edges:
        path: list[int] = []
        above = edge.parent
        while above is not None:
            path = above.tokens + path
            above = above.parent
        assert edge.start == len(path)
        assert edge.tokens
        for row, target, request in edge.scored:
            context, continuation = pairs[request]
            assert (context + continuation)[: edge.start + row + 1] == path + edge.tokens[: row + 1]
            found[request][edge.start + row] = target
        assert len({child.tokens[0] for child in edge.children}) == len(edge.children)
    assert len({root.tokens[0] for root in roots}) == len(roots)
    for index, (context, continuation) in enumerate(pairs):
        expected = dict(enumerate(continuation, start=len(context) - 1))
        assert found[index] == expected
    placed = [edge for members in _packed(edges) for edge, _, _ in members]
    assert placed == edges


def test_texts_are_split_as_lm_eval_splits_them(engine: Engine) -> None:
    encode = engine.tokenizer.encode
    texts = engine.loglikelihood([("The sky is ", "blue"), ("", "blue")])
    ids = engine.loglikelihood([(encode("The sky is"), encode(" blue")), ([0], encode("blue"))])
    assert texts == ids


def test_perplexity_is_that_of_its_windows(model: PreTrainedModel, engine: Engine) -> None:
    tokens = ids_of(110)
    windows = [tokens[at : at + 25] for at in (0, 25, 50, 75)]
    mean = np.mean([plain(model, window[:1], window[1:])[0] / 24 for window in windows])
    assert engine.perplexity(tokens, window=25) == pytest.approx(math.exp(-mean), rel=1e-4)
    whole = plain(model, tokens[:1], tokens[1:])[0] / 109
    assert engine.perplexity(tokens) == pytest.approx(math.exp(-whole), rel=1e-4)
    assert engine.perplexity("Some text.") > 1


def test_wrong_requests_are_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="continuation is empty"):
        engine.loglikelihood([([1], [])])
    with pytest.raises(InputError, match="do not fit the context of 256"):
        engine.loglikelihood([([1] * 200, [1] * 58)])
    assert engine.loglikelihood([]) == []
    with pytest.raises(InputError, match="window"):
        engine.perplexity([1, 2, 3], window=300)
    with pytest.raises(InputError, match="too few"):
        engine.perplexity([1])
