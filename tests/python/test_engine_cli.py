"""``qtale generate`` and ``qtale chat``."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qtale
from engine_samples import make_model, save_model
from qtale.cli.main import main
from qtale.engine import Piece, Session

TEMPLATE = (
    "{% for message in messages %}[{{ message.role[0] }}]{{ message.content }}{% endfor %}"
    "{% if messages[-1].content == 'fail' %}{{ raise_exception('asked to') }}{% endif %}[a]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model(make_model("llama"), tmp_path_factory.mktemp("cli") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_generate_prints_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "Hello", "--max-new-tokens", "12", "--temperature", "1", "--seed", "4"]
    expected = qtale.load(folder).generate("Hello", 12, temperature=1.0, seed=4)
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == str(expected)
    assert (found["prompt_tokens"], found["new_tokens"]) == (5, len(expected.tokens))
    assert found["finish_reason"] == expected.finish_reason


def test_generate_reads_stdin_and_takes_the_options_of_loading(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    options = ["--bits", "4", "--lm-head-bits", "8", "--compute", "float", "--cache", str(tmp_path / "cache")]
    assert main(["generate", str(folder), "-", "--max-new-tokens", "3", "--threads", "1", *options]) == 0
    assert capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_mistakes_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["", "--seed", "1"], ["Hi", "--temperature", "-1"], ["Hi", "--max-new-tokens", "1000"]):
        assert main(["generate", str(folder), *arguments]) == 1
        assert capsys.readouterr().err.count("qtale: error: generate: ") == 1


def test_chat_answers_line_by_line_and_keeps_its_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nfail\nAgain\n"))
    assert main(["chat", str(folder), "--json", "--max-new-tokens", "8", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in out.splitlines())
    assert "asked to" in err
    engine = qtale.load(folder)
    prompt = "[s]Be brief.[u]Hello[a]"
    assert first["text"] == str(engine.generate(prompt, 8))
    prompt = f"[s]Be brief.[u]Hello[a]{first['text']}[u]Again[a]"
    assert second["text"] == str(engine.generate(prompt, 8))
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= len("[s]Be brief.[u]Hello[a]")


def test_chat_prints_text(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{qtale.load(folder).generate('[u]Hello[a]', 8)}\n"


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Session.stream

    def interrupted(session: Session, prompt: list[int], *rest: Any, **options: Any) -> Iterator[Piece]:
        pieces = whole(session, prompt, *rest, **options)
        if len(prompt) > 10:
            yield from pieces
            return
        yield next(pieces)
        yield next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "stream", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\n"))
    assert main(["chat", str(folder), "--json", "--max-new-tokens", "8"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["finish_reason"], first["new_tokens"]) == ("interrupted", 2)
    assert second["finish_reason"] == "length"
    # The tokens of "[u]Hi[a]", and of the answer the first that ran.
    assert second["reused_tokens"] == 9
