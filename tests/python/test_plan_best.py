"""Metric best: plans by several scores are run, and the one nearest to the dense model is taken."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from importance_samples import LAYERS, linear_weights, load_model, rounded, save_model, some_tokens
from qtale import MeasureOptions, QuantSpec
from qtale.checkpoint import open_folder
from qtale.errors import InputError
from qtale.importance import Importance, measure_tokens
from qtale.importance import trial as trial_module
from qtale.importance.trial import divergences
from qtale.planner import Options, Plan, Planner, open_source, plan
from qtale.planner import trial as plan_trial

TOKENS = some_tokens(5)
BEST = Options(metric="best", choices=(8, 4, 2), group_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("best") / "llama")


@pytest.fixture(scope="module")
def importance(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "importance.json"
    options = MeasureOptions(metrics=("jaccard", "fisher", "kl"), top_k=9, group_size=32, loss_sequences=4)
    measure_tokens(model, TOKENS, options, progress=False).write(path)
    return path


def bits_by_module(model: Path, seed: int) -> dict[str, int]:
    draw = np.random.default_rng(seed)
    names = [name for layer in range(LAYERS) for name in linear_weights(load_model(model), layer)]
    return {name: int(draw.choice([16, 8, 4, 2])) for name in names}


def plain_divergence(model: Path, tokens: np.ndarray, bits: dict[str, int]) -> float:
    """KL between the whole dense model and one rounded in plain torch, in nats per token."""
    whole, changed = load_model(model), load_model(model)
    with torch.no_grad():
        for layer in range(LAYERS):
            for name, weight in linear_weights(changed, layer).items():
                if bits[name] != 16:
                    weight.copy_(rounded(weight, bits[name], 32, torch.float32))
        expected, found = (one(torch.from_numpy(tokens)).logits.log_softmax(-1) for one in (whole, changed))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_divergences_equal_those_of_the_whole_model(model: Path) -> None:
    ways = [bits_by_module(model, seed) for seed in range(3)]
    specs = [lambda name, bits=bits: None if bits[name] == 16 else QuantSpec(bits[name], 32) for bits in ways]
    found = divergences(open_folder(model), TOKENS, [*specs, lambda _: None], progress=False)
    # Weights midway between codes may go either way.
    assert found[:3] == pytest.approx([plain_divergence(model, TOKENS, bits) for bits in ways], rel=0.02)
    assert found[3] == 0
    assert len({round(nats, 4) for nats in found}) == 4


def test_files_instead_of_memory_change_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [lambda _: QuantSpec(4, 32), lambda _: QuantSpec(2, 32)]
    expected = divergences(open_folder(model), TOKENS, specs, progress=False)
    monkeypatch.setattr(trial_module, "MAX_MEMORY", 0)
    assert divergences(open_folder(model), TOKENS, specs, progress=False) == expected


@pytest.mark.parametrize("average", [2.5, 3.5, 5.0])
def test_the_plan_that_runs_nearest_is_taken(model: Path, importance: Path, average: float) -> None:
    plans = {
        metric: plan(importance, bits=average, options=dataclasses.replace(BEST, metric=metric), progress=False)
        for metric in ("kl", "fisher", "jaccard")
    }
    modules = [name for layer in range(LAYERS) for name in linear_weights(load_model(model), layer)]
    nats = {
        metric: plain_divergence(model, TOKENS[:4], {name: one.bits_of(name) for name in modules})
        for metric, one in plans.items()
    }
    found = plan(importance, bits=average, options=BEST, progress=False)
    assert found.layers == plans[min(nats, key=lambda metric: nats[metric])].layers
    assert found.metric in plans


def test_plans_that_are_alike_are_not_run(importance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "divergences", None)
    assert {layer.num_bits for layer in plan(importance, bits=8, options=BEST, progress=False).layers} == {8}


def test_budgets_take_the_best_too(importance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(open_source(importance), dataclasses.replace(BEST, context=16).resolved(), progress=False)
    tried: list[tuple[str, ...]] = []

    def last(source: object, plans: list[Plan], progress: bool) -> Plan:
        tried.append(tuple(one.metric for one in plans))
        return plans[-1]

    monkeypatch.setattr("qtale.planner.make.least_divergent", last)
    least = dataclasses.replace(planner, options=dataclasses.replace(planner.options, metric="kl")).for_average(3)
    assert planner.for_bytes(least.needed_bytes).metric == "jaccard"
    assert tried == [("kl", "fisher", "jaccard")]


def test_files_without_tokens_and_without_scores(model: Path, importance: Path, tmp_path: Path) -> None:
    older = json.loads(importance.read_text())
    assert older.pop("tokens") == TOKENS[:4].tolist()
    path = tmp_path / "older.json"
    path.write_text(json.dumps(older))
    with pytest.raises(InputError, match="this one has none, so measure again, or name a metric"):
        plan(path, bits=3.5, options=BEST, progress=False)
    assert plan(path, bits=3.5, options=dataclasses.replace(BEST, metric="auto"), progress=False).metric == "kl"
    with pytest.raises(InputError, match="metric 'best' needs scores"):
        plan(model, bits=3.5, options=BEST, progress=False)
    for wrong in ("text", [[1, 2], [3]], [[1, -2]], [[1, 2.5]]):
        with pytest.raises(InputError, match="'tokens' must be lists of token numbers"):
            Importance.from_json({**older, "tokens": wrong})


def test_trials_say_what_they_found(importance: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "qtale"):
        plan(importance, bits=3.5, options=BEST, progress=False)
    lines = [record.message for record in caplog.records if record.module == plan_trial.__name__.rpartition(".")[2]]
    assert len(lines) > 1
    assert all("nats per token" in line for line in lines)
    assert any(a != b for a, b in itertools.pairwise(lines))
