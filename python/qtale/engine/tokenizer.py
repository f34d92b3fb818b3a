"""The tokenizer of a model folder, by the tokenizers library alone; text that streams out is whole characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint.index import read_json_object
from qtale.errors import CheckpointError, InputError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE, CONFIG_FILE, GENERATION_FILE = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_REPLACEMENT = "\ufffd"
# More bytes than a character has, and the tokens that an emoji of several characters may take.
_MOST_PENDING = 16


class Tokenizer:
    """Text to token ids and back; ``bos_token`` and ``eos_token`` are texts or None.

    Special tokens are added as tokenizer.json's post-processor says; ``add_bos_token`` of tokenizer_config.json, which
    it already contains, is ignored as transformers ignores it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _optional_json(folder / CONFIG_FILE)
        self.bos_token = self.special("bos_token")
        self.eos_token = self.special("eos_token")
        self._backend = _read_backend(folder)
        self._add_named_tokens()

    def special(self, name: str) -> str | None:
        """The text of ``bos_token``, ``eos_token`` …, None where tokenizer_config.json has none."""
        return _token_text(self.config.get(name))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if not isinstance(text, str):
            raise InputError(f"encode: expected a text, got {type(text).__name__}.")
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token, None where it has none."""
        return self._backend.token_to_id(token)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder of tokens that come one by one."""
        return TextStream(self, skip_special_tokens)

    def _add_named_tokens(self) -> None:
        from tokenizers import AddedToken

        named = [self.special(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
        missing = [token for token in named if token and self._backend.token_to_id(token) is None]
        self._backend.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(missing)])


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        # Tokens before _begin are out; those from there to _end are decoded again for the spaces between tokens.
        self._begin = self._end = 0

    def push(self, token: int) -> str:
        """The text that is certain now; empty while the token is a part of a character."""
        self._ids.append(token)
        text = self._pending()
        unfinished = text.endswith(_REPLACEMENT) and len(self._ids) - self._end <= _MOST_PENDING
        return "" if unfinished else self._advance(text)

    def flush(self) -> str:
        """What is left at the end; bytes of an unfinished character become U+FFFD."""
        return self._advance(self._pending())

    def _pending(self) -> str:
        return self._tokenizer.decode(self._ids[self._begin :], self._skip)

    def _advance(self, text: str) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._end], self._skip)
        if len(text) > len(before):
            self._begin, self._end = self._end, len(self._ids)
        return text[len(before) :]


def end_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a text: of generation_config.json, else of config.json; empty where neither names one."""
    for fields in (_optional_json(folder / GENERATION_FILE), config):
        found = fields.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{folder}: eos_token_id is {found!r}; it must be a token id or a list of them.")
        if ids:
            return frozenset(ids)
    return frozenset()


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UnsupportedError(
            f"{folder}: has no {TOKENIZER_FILE}; give token ids, or convert its tokenizer by loading and saving "
            "it with transformers."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises plain Exception for every fault of a file.
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizers library cannot read it: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(path: Path) -> Mapping[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object that holds it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
