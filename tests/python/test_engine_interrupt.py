"""Ctrl-C while an engine scores: the call ends, and the engine goes on as if it had never run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale.engine import Engine

CALLS: dict[str, Callable[[Engine], Any]] = {
    "loglikelihood": lambda engine: engine.loglikelihood(
        [(ids_of(200, seed=seed // 4), ids_of(9, seed=seed)) for seed in range(24)]
    ),
    "perplexity": lambda engine: engine.perplexity(ids_of(1500), window=250),
}


class Interrupted:
    """A decoder that has Ctrl-C pressed, by another thread, while one of its passes runs."""

    def __init__(self, decoder: Any, at_pass: int) -> None:
        self._decoder, self._left = decoder, at_pass

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._decoder, name)
        if name != "score":
            return found

        def scored(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                threading.Thread(target=signal.raise_signal, args=[signal.SIGINT]).start()
            return found(*arguments)

        return scored


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sizes = {"hidden_size": 128, "intermediate_size": 512}
    folder = save_model(make_model("qwen2", **sizes), tmp_path_factory.mktemp("interrupt") / "model")
    with qtale.load(folder, progress=False) as loaded:
        yield loaded


@pytest.fixture
def default_handler() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize("at_pass", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_stops_scoring_and_leaves_nothing_behind(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, at_pass: int
) -> None:
    call = CALLS[name]
    expected, passes = call(engine), engine.report.passes
    assert passes >= at_pass
    assert passes > 1
    words = engine.generate(ids_of(30), 10, ignore_end=True)

    def forever() -> None:
        while True:
            call(engine)

    with monkeypatch.context() as patched:
        patched.setattr(engine._passes, "_decoder", Interrupted(engine._passes.decoder, at_pass))
        with pytest.raises(KeyboardInterrupt):
            forever()
    assert not any(engine._passes.decoder.kv_bytes())
    assert call(engine) == expected
    assert engine.report.passes == passes
    assert engine.generate(ids_of(30), 10, ignore_end=True) == words
