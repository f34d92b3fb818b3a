"""Tokens to text and back: the tokenizer, streams of whole characters, stop strings, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from eval_samples import byte_tokenizer
from qtale.engine import ChatTemplate
from qtale.engine.inputs import Inputs
from qtale.engine.text import StoppedText
from qtale.engine.tokenizer import Tokenizer, end_tokens
from qtale.errors import CheckpointError, InputError, UnsupportedError

TEXTS = (
    "Hello world",
    "  leading and trailing  ",
    "Übung, naïve café — 你好, мир! 🎉👩‍👩‍👧",
    "line\nbreak\t\ttabs\r\n",
    "<|im_start|>user\nHi<|im_end|>",
    "x = [1, 2, 3]  # code",
    "",
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'bad' %}{{ raise_exception('no bad') }}"
    "{% endif %}[{{ message.role }}]{% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}"
    "{% if loop.last %}{% break %}{% endif %}\n{% endfor %}{{ messages[0] | tojson }}{{ tools is none }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": " <b>Hi</b> é "}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


def folder_with(path: Path, template: str | None = None, **config: Any) -> Path:
    """A folder with the tokenizer of one token a byte."""
    byte_tokenizer().save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_those_of_transformers(expected: Any, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == expected.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == expected.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("template", [None, "<s> $A", "$A <|end|>", "<s> $A <|end|>"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_special_tokens_come_as_transformers_adds_them(
    tmp_path: Path, template: str | None, config: dict[str, Any]
) -> None:
    path = folder_with(tmp_path / "model", bos_token="<s>", **config)
    if template is not None:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        backend.add_special_tokens(["<s>"])
        special = [("<s>", 257), ("<|end|>", 0)]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
        backend.save(str(path / "tokenizer.json"))
    expected = AutoTokenizer.from_pretrained(path)
    found = Tokenizer(path)
    assert found.encode("Hi") == expected.encode("Hi")
    assert found.encode("Hi", add_special_tokens=False) == expected.encode("Hi", add_special_tokens=False)
    assert found.token_id("<s>") == expected.bos_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_streams_give_whole_characters(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    for each in (tokenizer, Tokenizer(folder_with(tmp_path / "bytes"))):
        stream = each.stream(skip_special_tokens=False)
        pieces = [stream.push(token) for token in each.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == text


def test_bytes_that_are_no_text_come_out_at_the_end(tmp_path: Path) -> None:
    each = Tokenizer(folder_with(tmp_path / "bytes"))
    cut = each.encode("aé")[:-1]
    stream = each.stream()
    assert [stream.push(token) for token in cut] == ["a", ""]
    assert stream.flush() == "\ufffd"
    stream = each.stream()
    pieces = [stream.push(cut[-1]) for _ in range(100)]
    assert any(pieces)
    assert "".join(pieces) + stream.flush() == each.decode([cut[-1]] * 100)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=20),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_find_finds_them(
    tmp_path_factory: pytest.TempPathFactory, text: str, stops: list[str]
) -> None:
    each = _bytes(tmp_path_factory)
    stopped = StoppedText(each.stream(), tuple(stops))
    out = ""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    for token in each.encode(text):
        out += stopped.push(token)
        if stopped.stopped:
            break
    out += stopped.flush()
    assert stopped.stopped == bool(ends)
    assert out == stopped.text
    if not ends:
        assert out == text
    else:
        # The first stop string that is complete ends the text where it begins.
        complete = text[: min(ends)]
        assert out == complete[: min(complete.find(stop) for stop in stops if stop in complete)]


_cached: list[Tokenizer] = []


def _bytes(factory: pytest.TempPathFactory) -> Tokenizer:
    if not _cached:
        _cached.append(Tokenizer(folder_with(factory.mktemp("bytes") / "model")))
    return _cached[0]


def test_chat_templates_render_as_transformers_renders_them(tmp_path: Path, demo_model: Path) -> None:
    folders = [
        folder_with(tmp_path / "jinja", TEMPLATE, bos_token="<s>"),
        folder_with(tmp_path / "config", bos_token="<s>", chat_template=TEMPLATE),
        folder_with(tmp_path / "named", chat_template=[{"name": "default", "template": TEMPLATE}]),
        demo_model,
    ]
    for folder in folders:
        expected = AutoTokenizer.from_pretrained(folder)
        tokenizer = Tokenizer(folder)
        template = ChatTemplate(tokenizer)
        for prompt in (True, False):
            text = expected.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
            assert template.render(MESSAGES, add_generation_prompt=prompt) == text
        ids = expected.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        assert template.encode(tokenizer, MESSAGES) == ids


def test_templates_cannot_reach_out_of_their_sandbox(tmp_path: Path) -> None:
    hidden = Tokenizer(folder_with(tmp_path / "hidden", "{{ ''.__class__ }}"))
    assert ChatTemplate(hidden).render(MESSAGES) == ""
    for number, template in enumerate(("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}")):
        tokenizer = Tokenizer(folder_with(tmp_path / str(number), template))
        with pytest.raises(InputError, match="does not take these messages"):
            ChatTemplate(tokenizer).render(MESSAGES)


def test_what_is_wrong_with_a_template_is_told(tmp_path: Path) -> None:
    template = ChatTemplate(Tokenizer(folder_with(tmp_path / "good", TEMPLATE, bos_token="<s>")))
    with pytest.raises(InputError, match="no bad"):
        template.render([{"role": "bad", "content": ""}])
    with pytest.raises(InputError, match="has no chat template"):
        ChatTemplate(Tokenizer(folder_with(tmp_path / "none")))
    with pytest.raises(CheckpointError, match="broken"):
        ChatTemplate(Tokenizer(folder_with(tmp_path / "broken", "{% for %}")))


def test_missing_and_broken_tokenizers_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_end_tokens_come_from_the_first_that_names_them(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "model")
    assert Inputs(path, 257, 10, end_tokens(path, {})).ends == {0}
    assert Inputs(tmp_path, 257, 10, end_tokens(tmp_path, {})).ends == frozenset()
    assert Inputs(path, 257, 10, end_tokens(path, {"eos_token_id": 5})).ends == {5}
    (path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert end_tokens(path, {"eos_token_id": 5}) == {6, 7}
