"""`qtale.deploy` on the engine: what runs is what the plan says, and changes of plan move only what changes."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qtale
from engine_samples import make_model
from engine_samples import save_model as save_member
from plan_samples import MIXED, MODULES, SIZES, deployer, make_plan, save_importance, save_model
from qtale import _core
from qtale.checkpoint import open_folder
from qtale.deployment import Deployment
from qtale.engine.arena import PAGE
from qtale.errors import Error, InputError
from qtale.memory import needed, shape_of_folder
from qtale.planner import Options
from tiny_models import run_python

IDS = list(range(1, 17))
deploy = deployer("engine", Options(choices=(16, 8, 4, 3, 2), group_size=32, context=32))
BUDGETS = ("2MiB", "900KiB", "700KiB", "560KiB", "480KiB", "560KiB", "700KiB", "900KiB")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with biases, in several files, with a tokenizer."""
    sizes = {**SIZES, "attention_bias": True, "tie_word_embeddings": True, "vocab_size": 257}
    model = make_model("llama", seed=3, **sizes)
    return save_member(model, tmp_path_factory.mktemp("models") / "biased", max_shard_size="200KB")


def bytes_of(deployment: Deployment, ids: list[int] = IDS) -> bytes:
    """All bits of the logits."""
    return deployment.engine.logits(ids).tobytes()


def homes_of(deployment: Deployment) -> dict[str, Any]:
    """Where each region lies."""
    model = deployment.engine._model
    assert model is not None
    return dict(model._homes)


def test_auto_takes_the_engine_where_it_runs_the_model(dense: Path, tmp_path: Path, caplog: Any) -> None:
    found = qtale.deploy(dense, "1GiB", plan=make_plan(dense, 8, 8, 4, 4), progress=False)
    assert found.backend == found.report.backend == found.report.to_json()["backend"] == "engine"
    with pytest.raises(InputError, match=r"use \.engine, or deploy with backend='torch'"):
        _ = found.model
    other = save_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with caplog.at_level(logging.INFO, "qtale"):
        found = qtale.deploy(other, "1GiB", plan=make_plan(other, 8, 8, 4, 4), progress=False)
    assert found.backend == "torch"
    assert "deploy: PyTorch runs this model." in caplog.text
    assert "gelu" in caplog.text
    with pytest.raises(InputError, match=r"it has no engine; use \.model"):
        _ = found.engine


def test_threads_and_the_rule_of_the_cache_reach_the_engine_and_stay(dense: Path) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 8, 8, 8, 8), num_threads=2, kv_rule="keep")
    deployment.replan(plan=make_plan(dense, 4, 4, 4, 4))
    model = deployment.engine._model
    assert model is not None
    assert (model.options.num_threads, model.options.kv_rule) == (2, "keep")
    for options, message in (
        ({"num_threads": 1025}, "num_threads 1025 is not a number of threads; use 1 to 1024"),
        ({"kv_rule": "drop"}, "kv_rule 'drop' is not known; use evict or keep"),
    ):
        with pytest.raises(InputError, match=message):
            deploy(dense, **options)


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_a_deployed_model_is_bit_for_bit_the_folder_of_its_plan(biased: Path, tmp_path: Path, compute: str) -> None:
    plan = make_plan(biased, 8, MIXED, 16, 2)
    deployment = deploy(biased, plan=plan, compute=compute)
    qtale.quantize(biased, tmp_path / "out", plan=plan, progress=False)
    engine = qtale.load(tmp_path / "out", compute=compute, progress=False)
    assert bytes_of(deployment) == engine.logits(IDS).tobytes()
    expected = engine.generate("Hello", 12)
    assert deployment.generate("Hello", 12) == expected
    torch_model = qtale.deploy(biased, plan=plan, compute=compute, backend="torch", progress=False).model
    with torch.no_grad():
        logits = torch_model(torch.tensor([IDS])).logits[0].numpy()
    spread, apart = float(logits.max() - logits.min()), logits - deployment.engine.logits(IDS)
    if compute == "int8" and (_core.has_bfloat16() or _core.cpu_isa() == "avx2"):
        # The engine's attention rounds there, too, so that both round activations to 8 bits at other places.
        assert np.sqrt(np.square(apart).mean()) < 0.02 * spread
    else:
        assert np.abs(apart).max() < {"int8": 0.02, "int16": 4e-4, "float": 1e-4}[compute] * spread


def test_budgets_are_kept_and_scores_decide(dense: Path, tmp_path: Path) -> None:
    deployment = deploy(dense, "700KiB")
    assert deployment.needed_bytes == deployment.plan.needed_bytes <= 700 << 10
    scores = save_importance(tmp_path / "importance.json", dense, {"jaccard": [0.1, 0.9, 0.7, 0.4]})
    by_layer = Options(granularity="layer", choices=(16, 4), group_size=32, context=32)
    found = deploy(dense, "800KiB", importance=scores, options=by_layer)
    widths = [layer.num_bits for layer in found.plan.layers]
    assert (widths[0], widths[1]) == (4, 16)


@pytest.mark.parametrize(("bits", "head"), [(16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (16, 2), (2, 16)])
def test_what_is_said_to_be_held_is_held(dense: Path, bits: int, head: int) -> None:
    plan = make_plan(dense, bits, bits, bits, bits, head=head)
    deployment = deploy(dense, plan=plan)
    model = deployment.engine._model
    assert model is not None
    pages = len(model.layout.regions)
    assert deployment.weights_bytes == pytest.approx(model.layout.nbytes, abs=pages * PAGE / 2)
    needs = needed(shape_of_folder(open_folder(dense)), plan.spec_of, context=0, batch=1, backend="engine")
    assert deployment.weights_bytes == needs.weights
    assert len(deployment.generate(IDS, 4, ignore_end=True).tokens) == 4


def test_a_change_of_plan_moves_only_what_changes(biased: Path) -> None:
    first, second = make_plan(biased, 8, MIXED, 16, 2), make_plan(biased, 8, 4, 16, 16)
    deployment = deploy(biased, plan=first)
    before = homes_of(deployment)
    report = deployment.replan(plan=second)
    after = homes_of(deployment)
    assert {name for name in before if before[name] != after[name]} == {
        *(f"layers.1.{part}" for part in ("qkv", "o", "down")),
        *(f"layers.3.{part}" for part in ("qkv", "o", "gate_up", "down")),
    }
    changed = {name for name in MODULES if first.bits_of(name) != second.bits_of(name)}
    assert {change.name for change in report.changes} == changed
    assert bytes_of(deployment) == bytes_of(deploy(biased, plan=second))
    assert report.bytes_freed == sum(change.bytes_before - change.bytes_after for change in report.changes) < 0
    assert deployment.replan(plan=second).changes == ()


def test_heads_of_their_own_change_too(dense: Path) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 8, 8, 8, 8, head=4))
    before = bytes_of(deployment)
    assert bytes_of(deployment) != bytes_of(deploy(dense, plan=make_plan(dense, 8, 8, 8, 8)))
    deployment.replan(plan=make_plan(dense, 8, 8, 8, 8))
    assert bytes_of(deployment) == bytes_of(deploy(dense, plan=make_plan(dense, 8, 8, 8, 8)))
    assert [change.name for change in deployment.replan(plan=make_plan(dense, 8, 8, 8, 8, head=4)).changes] == [
        "lm_head"
    ]
    assert bytes_of(deployment) == before


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.sampled_from([16, 8, 4, 3, 2]), min_size=4, max_size=4), min_size=2, max_size=4))
def test_any_way_to_a_plan_gives_the_same_bits(biased: Path, plans: list[list[int]]) -> None:
    deployment = deploy(biased, plan=make_plan(biased, *plans[0]))
    for bits in plans[1:]:
        deployment.replan(plan=make_plan(biased, *bits))
    assert bytes_of(deployment) == bytes_of(deploy(biased, plan=make_plan(biased, *plans[-1])))


def test_twenty_replans_give_the_same_text_for_the_same_plan(dense: Path) -> None:
    deployment = deploy(dense)
    seen: dict[str, tuple[Any, bytes, Any]] = {}
    for budget in itertools.islice(itertools.cycle(BUDGETS), 20):
        report = deployment.replan(budget)
        assert deployment.needed_bytes <= (report.budget_bytes or 0)
        text = deployment.generate(IDS, 12, ignore_end=True).tokens
        found = (deployment.plan.layers, bytes_of(deployment), text)
        assert seen.setdefault(budget, found) == found
    assert len({logits for _, logits, _ in seen.values()}) == len(seen)


def test_what_is_open_during_a_change_ends_with_a_sentence(biased: Path) -> None:
    small, large = make_plan(biased, 4, 4, 4, 4), make_plan(biased, 8, 8, 8, 8)
    deployment = deploy(biased, plan=small)
    session, idle = deployment.engine.session(), deployment.engine.session()
    pieces = deployment.generate("Hello", 12, ignore_end=True, stream=True)
    next(pieces)
    answer = session.stream("Hi", 12)
    next(answer)
    # Nothing moves, so nothing ends.
    deployment.replan(plan=small)
    next(pieces)
    next(answer)
    deployment.replan(plan=large)
    for stream in (pieces, answer, session.stream("Hi", 2), idle.stream("Hi", 2)):
        with pytest.raises(InputError, match="weights were changed while this sequence was open; begin it anew"):
            next(stream)
    session.close()
    idle.close()
    expected = deploy(biased, plan=large).generate("Hello", 12)
    assert deployment.generate("Hello", 12) == expected
    with deployment.engine.session() as anew:
        assert [piece.tokens for piece in anew.stream("Hello", 4)]
    assert not any(deployment.engine._passes.decoder.kv_bytes())


def test_theta_and_depth_outlast_a_change(biased: Path) -> None:
    deployment = deploy(biased, plan=make_plan(biased, 4, 4, 4, 4))
    deployment.engine.theta = 0.25
    deployment.engine.set_depth([0, 2])
    before = bytes_of(deployment)
    deployment.replan(plan=make_plan(biased, 8, 8, 8, 8))
    deployment.replan(plan=make_plan(biased, 4, 4, 4, 4))
    assert deployment.engine.theta == 0.25
    assert bytes_of(deployment) == before
    deployment.engine.set_depth(None)
    assert bytes_of(deployment) != before


def test_calls_from_other_threads_wait_for_a_change(biased: Path) -> None:
    plans = [make_plan(biased, *bits) for bits in ((4, 4, 4, 4), (8, 4, 16, 2), (3, 3, 8, 8))]
    expected = {deploy(biased, plan=plan).generate(IDS, 8, ignore_end=True).tokens for plan in plans}
    deployment = deploy(biased, plan=plans[0])
    answers: list[Any] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                answers.append(deployment.generate(IDS, 8, ignore_end=True).tokens)
        except Error as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(12):
        deployment.replan(plan=plans[step % 3])
    done.set()
    for thread in threads:
        thread.join()
    assert answers
    assert set(answers) <= expected


def test_a_change_that_fails_is_taken_back_each_time(tmp_path: Path) -> None:
    own = save_model(tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][5, 7] = float("nan")
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    deployment = deploy(own, plan=make_plan(own, 16, 8, 16, 4))
    deployment.engine.set_depth([0, 1, 3])
    before = bytes_of(deployment)
    for _ in range(3):
        with pytest.raises(Error, match=r"layers\.2\.self_attn\.k_proj\.weight cannot be quantized: .*NaN"):
            deployment.replan(plan=make_plan(own, 8, 4, 8, 8))
        assert bytes_of(deployment) == before
    assert deployment.replan(plan=make_plan(own, 8, 4, 16, 8)).changes
    assert bytes_of(deployment) != before


def test_memory_that_the_system_does_not_give_changes_nothing(dense: Path, monkeypatch: Any) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 4, 4, 4, 4))
    before, session = bytes_of(deployment), deployment.engine.session()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("qtale.engine.arena.mmap.mmap", refuse)
        with pytest.raises(Error, match=r"the system does not give .* bytes of memory"):
            deployment.replan(plan=make_plan(dense, 8, 8, 8, 8))
    assert bytes_of(deployment) == before
    assert [piece.tokens for piece in session.stream(IDS, 2)]


def test_a_closed_engine_is_not_changed(dense: Path) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 4, 4, 4, 4))
    change = deployment.engine.change()
    deployment.engine.close()
    for call in (lambda: deployment.replan(plan=make_plan(dense, 8, 8, 8, 8)), change.__enter__):
        with pytest.raises(InputError, match="the engine is closed; load the model again"):
            call()
    with pytest.raises(InputError, match="the engine is closed"):
        deployment.generate(IDS, 2)


def test_a_plan_is_deployed_and_changed_without_torch(dense: Path, tmp_path: Path) -> None:
    for name, bits in (("first", 8), ("second", 3)):
        make_plan(dense, bits, bits, bits, bits).write(tmp_path / f"{name}.json")
    code = (
        f"import sys, qtale; it = qtale.deploy({str(dense)!r}, '1GiB', plan='first.json', progress=False); "
        "it.generate([1, 2, 3], 4); print(len(it.replan(plan='second.json').changes)); "
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code, tmp_path).split() == [str(len(MODULES))]
