"""Generation: greedy against transformers, batches against singles, streams, seeds, sessions."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale.engine import Engine, Generation, Piece
from qtale.errors import InputError

PROMPTS = [ids_of(count, seed=count) for count in (1, 9, 33, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", head_dim=16), tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return qtale.load(folder)


def test_greedy_is_what_transformers_generates(folder: Path, engine: Engine) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in PROMPTS:
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        found = engine.generate(prompt, 40)
        assert isinstance(found, Generation)
        assert list(found.tokens) == expected.tolist()
        assert found.prompt_tokens == len(prompt)
        assert found.finish_reason == ("stop" if found.tokens[-1] == 0 else "length")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_batch_gives_what_its_prompts_give_alone(engine: Engine, options: dict[str, Any]) -> None:
    seeds = [11, 12, 13, 14]
    batch = engine.generate(PROMPTS, 25, seed=seeds, ignore_end=True, **options)
    alone = [
        engine.generate(prompt, 25, seed=seed, ignore_end=True, **options)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert batch == alone
    assert not any(engine._passes.decoder.kv_bytes())


def test_more_prompts_than_run_at_a_time_keep_their_order(engine: Engine) -> None:
    prompts = [ids_of(3 + index % 5, seed=index) for index in range(40)]
    results = engine.generate(prompts, 5, ignore_end=True)
    assert isinstance(results, list)
    assert [result.tokens for result in results] == [
        engine.generate(prompt, 5, ignore_end=True).tokens for prompt in prompts
    ]


def test_a_stream_gives_the_pieces_of_the_text(engine: Engine) -> None:
    prompts = ["One", "Another prompt"]
    whole = engine.generate(prompts, 30, temperature=1.0, seed=3)
    pieces = list(engine.generate(prompts, 30, temperature=1.0, seed=3, stream=True))
    for index, result in enumerate(whole):
        mine = [piece for piece in pieces if isinstance(piece, Piece) and piece.prompt == index]
        assert "".join(mine) == result.text
        assert tuple(token for piece in mine for token in piece.tokens) == result.tokens
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [result.finish_reason]


def test_leaving_a_stream_frees_its_cache(engine: Engine) -> None:
    stream = engine.generate("Hello", 30, ignore_end=True, stream=True)
    next(iter(stream))
    assert any(engine._passes.decoder.kv_bytes())
    stream.close()
    assert not any(engine._passes.decoder.kv_bytes())


def test_text_ends_before_a_stop_string(engine: Engine) -> None:
    whole = engine.generate("Hello", 60, temperature=1.0, seed=1, ignore_end=True)
    text = str(whole)
    stop = text[20:23]
    at = min(place for place in (text.find(stop), text.find("\x00never")) if place >= 0)
    found = engine.generate("Hello", 60, temperature=1.0, seed=1, ignore_end=True, stop=[stop, "\x00never"])
    assert isinstance(found, Generation)
    assert (found.text, found.finish_reason) == (text[:at], "stop")
    pieces = engine.generate("Hello", 60, temperature=1.0, seed=1, ignore_end=True, stop=stop, stream=True)
    assert "".join(str(piece) for piece in pieces) == text[:at]


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def tokens(**options: Any) -> list[tuple[int, ...]]:
        found = engine.generate(["Hello"] * 2, 20, temperature=1.0, ignore_end=True, **options)
        return [each.tokens for each in found]

    one = tokens(seed=5)
    assert one == tokens(seed=5)
    assert one[0] != one[1]
    assert one != tokens(seed=6)
    assert tokens() != tokens()
    assert tokens(seed=[5, 5]) == [one[0]] * 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": "hot"}, "temperature 'hot' is not accepted; it must be 0 .greedy. or more"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0}, "top_p 0"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed -1"),
        ({"seed": [1, 2]}, "2 seeds"),
        ({"stop": ""}, "stop"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 252}, "prompt of 5 tokens and 252 new tokens do not fit the context of 256"),
    ],
)
def test_wrong_values_are_named(engine: Engine, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        engine.generate("Hello", **options)


def test_wrong_prompts_are_named(engine: Engine) -> None:
    for wrong, named in (
        ("", "the prompt is empty; give at least one token"),
        ([[]], "the prompt is empty; give at least one token"),
        ([300], "token id 300 is not known; this model has ids from 0 to 256"),
        (["ok", ""], "the prompt is empty; give at least one token"),
        ([[1], 2], "2 is no prompt; give a text, or a list of token ids"),
    ):
        with pytest.raises(InputError, match=named):
            engine.generate(wrong)  # type: ignore[arg-type]
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 7},
        {"stop": "e", "temperature": 1.0, "seed": [3]},
        {"ignore_end": True, "repetition_penalty": 1.5},
    ],
)
def test_a_session_takes_the_options_of_generate(engine: Engine, options: dict[str, Any]) -> None:
    with engine.session() as session:
        list(session.stream("Hello", 25, **options))
        assert session.last == engine.generate("Hello", 25, **options)
        with pytest.raises(InputError, match="top_k -1"):
            list(session.stream("Hello", 25, top_k=-1))


def test_a_session_ignores_the_end_where_asked_to(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine.generate("Hello", 1).tokens[0]
    monkeypatch.setattr(engine._inputs, "_ends", frozenset([first]))
    with engine.session() as session:
        for ignore_end, count in ((False, 1), (True, 5)):
            list(session.stream("Hello", 5, ignore_end=ignore_end))
            assert session.last is not None
            assert len(session.last.tokens) == count


def test_a_session_reads_only_what_is_new(engine: Engine) -> None:
    with engine.session() as session:
        first = ids_of(50)
        answer = "".join(session.stream(first, 10))
        assert session.last == engine.generate(first, 10)
        assert session.last is not None
        assert session.last.text == answer
        assert session.reused == 0
        second = [*first, *session.last.tokens, *ids_of(20, seed=9)]
        list(session.stream(second, 10))
        assert session.reused >= 50 + len(session.last.tokens) - 1 - 10
        assert session.last == engine.generate(second, 10)
        list(session.stream(first[:30], 10))
        assert session.reused == 29
        assert session.last == engine.generate(first[:30], 10)
        stream = session.stream(second, 10)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        list(session.stream(second, 10))
        assert session.last == engine.generate(second, 10)
    assert not any(engine._passes.decoder.kv_bytes())


def test_threads_take_turns(engine: Engine) -> None:
    expected = [engine.generate(prompt, 10, ignore_end=True) for prompt in PROMPTS]
    found: list[Any] = [None] * len(PROMPTS)

    def work(index: int) -> None:
        found[index] = engine.generate(PROMPTS[index], 10, ignore_end=True)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_two_engines_do_not_disturb_each_other(folder: Path, engine: Engine) -> None:
    expected = engine.generate(PROMPTS[1], 20, ignore_end=True)
    with qtale.load(folder, bits=4, num_threads=2) as other:
        alone = other.generate(PROMPTS[2], 20, ignore_end=True)
        streams = [
            engine.generate(PROMPTS[1], 20, ignore_end=True, stream=True),
            other.generate(PROMPTS[2], 20, ignore_end=True, stream=True),
        ]
        found: list[list[int]] = [[], []]
        for pieces in zip(*streams, strict=True):
            for tokens, piece in zip(found, pieces, strict=True):
                tokens.extend(piece.tokens)
        assert [tuple(tokens) for tokens in found] == [expected.tokens, alone.tokens]
    assert engine.generate(PROMPTS[1], 20, ignore_end=True) == expected


def test_ctrl_c_stops_a_call_and_leaves_nothing_behind(engine: Engine) -> None:
    def forever() -> None:
        while True:
            engine.generate(PROMPTS, 150, ignore_end=True)

    expected = engine.generate(PROMPTS[3], 10)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            forever()
    finally:
        signal.signal(signal.SIGINT, old)
    assert not any(engine._passes.decoder.kv_bytes())
    assert engine.generate(PROMPTS[3], 10) == expected
