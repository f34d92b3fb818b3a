"""Engines beside other threads of Python: they run while a pass does, and engines do not disturb one another."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale.engine import Engine

CALLS: dict[str, Callable[[Engine], Any]] = {
    "logits": lambda engine: engine.logits(ids_of(500)).tolist(),
    "generate": lambda engine: engine.generate([ids_of(120, seed=seed) for seed in range(4)], 1, ignore_end=True),
    "loglikelihood": lambda engine: engine.loglikelihood([(ids_of(450), ids_of(50, seed=1))]),
    "perplexity": lambda engine: engine.perplexity(ids_of(500)),
}
REPEATS = 6


class Watched:
    """A decoder that tells whether a pass of it runs right now."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self.running = decoder, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._decoder, name)
        if name not in ("forward", "score"):
            return found

        def watched(*arguments: Any) -> Any:
            self.running = True
            try:
                return found(*arguments)
            finally:
                self.running = False

        return watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose passes take a while: tens of milliseconds and more."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 512}
    return save_model(make_model("llama", **sizes), tmp_path_factory.mktemp("threads") / "model")


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Threads get the interpreter only when another one lets it go by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_forced_switches")
@pytest.mark.parametrize("name", CALLS)
def test_another_thread_runs_while_a_pass_does(folder: Path, name: str) -> None:
    with qtale.load(folder, num_threads=1, progress=False) as engine:
        watched = Watched(engine._passes.decoder)
        engine._passes._decoder = watched  # type: ignore[assignment]
        thread = threading.Thread(target=CALLS[name], args=(engine,))
        seen = 0
        thread.start()
        while thread.is_alive():
            seen += watched.running
            time.sleep(0.001)
        thread.join()
    assert seen > 0


def test_engines_in_threads_of_their_own_give_what_they_give_alone(folder: Path) -> None:
    with (
        qtale.load(folder, kv_dtype="float32", progress=False) as one,
        qtale.load(folder, bits=4, group_size=32, num_threads=2, progress=False) as other,
    ):
        engines = [one, other]
        alone = [{name: call(engine) for name, call in CALLS.items()} for engine in engines]
        assert alone[0]["logits"] != alone[1]["logits"]
        found: list[list[dict[str, Any]]] = [[], []]
        together = threading.Barrier(len(engines))

        def work(index: int) -> None:
            together.wait()
            for repeat in range(REPEATS):
                # In another order each time, so that all kinds of calls meet.
                names = [*CALLS][repeat % len(CALLS) :] + [*CALLS][: repeat % len(CALLS)]
                found[index].append({name: CALLS[name](engines[index]) for name in names})

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(engines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for results, expected in zip(found, alone, strict=True):
        assert len(results) == REPEATS
        assert all(result == expected for result in results)


def test_threads_that_share_an_engine_score_what_they_score_alone(folder: Path) -> None:
    with qtale.load(folder, bits=8, progress=False) as engine:
        alone = {name: call(engine) for name, call in CALLS.items()}
        found: dict[str, list[Any]] = {name: [] for name in CALLS}
        together = threading.Barrier(len(CALLS))

        def work(name: str) -> None:
            together.wait()
            found[name] += [CALLS[name](engine) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(name,)) for name in CALLS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(engine._passes.decoder.kv_bytes())
    assert found == {name: [value] * 3 for name, value in alone.items()}
