"""Chat templates: jinja2 in its sandbox, with the variables and functions that transformers gives to templates."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtale.engine.tokenizer import Tokenizer
from qtale.errors import CheckpointError, InputError

TEMPLATE_FILE = "chat_template.jinja"
_MOST_BYTES = 1 << 20
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """The chat template of a model: of chat_template.jinja, else of tokenizer_config.json.

    Raises InputError where the model has none, CheckpointError where jinja2 cannot read it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import jinja2

        self._where = str(tokenizer.folder)
        source = _source(tokenizer.folder, tokenizer.config)
        self._tokens = {name: tokenizer.special(name) for name in _TOKENS if tokenizer.special(name) is not None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{self._where}: its chat template is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; raises InputError where the template refuses it or fails."""
        import jinja2

        plain = json.loads(json.dumps(list(messages)))
        variables = {**self._tokens, "messages": plain, "tools": None, "documents": None}
        try:
            text: str = self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        # A template is a program of somebody else: it may fail in any way.
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self._where}: its chat template does not take these messages: {error}") from error
        return text

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins; the template itself holds special tokens."""
        return tokenizer.encode(self.render(messages), add_special_tokens=False)


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise CheckpointError(f"{path}: is larger than {_MOST_BYTES} bytes, which no template needs.")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
        found = named.get("default")
    if not isinstance(found, str):
        raise InputError(
            f"{folder}: has no chat template ({TEMPLATE_FILE} or tokenizer_config.json); it is no chat model. Use "
            "generate with a prompt instead."
        )
    return found


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %} … {% endgeneration %}`` marks answers for training; here it only holds its text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which templates do not expect.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
