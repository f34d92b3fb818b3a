"""``qtale chat MODEL``: a conversation with a chat model, one line of stdin at a time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from qtale.cli.generate import add_model_arguments, add_sampling_arguments, answer_json, load_engine, sampling_of
from qtale.errors import Error

if TYPE_CHECKING:
    from qtale.engine import ChatTemplate, Engine, Session

NAME = "chat"
HELP = "talk with a chat model"
_PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, dense or quantized, a hub name, or 'demo'")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--json", action="store_true", help="print one JSON object a turn")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends; returns 0."""
    from qtale.engine import ChatTemplate

    sampling_of(args)
    with load_engine(args) as engine, engine.session() as session:
        conversation = _Conversation(args, engine, ChatTemplate(engine.tokenizer), session)
        if sys.stdin.isatty():
            print("Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
        while (line := _read_line()) is not None:
            if line.strip():
                conversation.turn(line.strip())
    return 0


def _read_line() -> str | None:
    """The next line of stdin, None at its end."""
    if sys.stdin.isatty():
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line if line else None


class _Conversation:
    """The messages so far; the cache holds the tokens of the last turn, of which the next one reads what is new."""

    def __init__(self, args: argparse.Namespace, engine: Engine, template: ChatTemplate, session: Session) -> None:
        self._args, self._engine, self._template, self._session = args, engine, template, session
        self._messages: list[dict[str, Any]] = []
        if args.system is not None:
            self._messages.append({"role": "system", "content": args.system})

    def turn(self, text: str) -> None:
        """Answer one message; where that fails, the message is forgotten and the reason printed."""
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except Error as error:
            self._messages.pop()
            print(f"qtale: error: {error}", file=sys.stderr)
            return
        self._messages.append({"role": "assistant", "content": answer})

    def _answer(self) -> str:
        tokens = self._template.encode(self._engine.tokenizer, self._messages)
        start, first, stopped = time.perf_counter(), None, False
        pieces = []
        try:
            options = {**sampling_of(self._args), "seed": self._args.seed}
            for piece in self._session.stream(tokens, self._args.max_new_tokens, **options):
                first = first or time.perf_counter()
                pieces.append(piece)
                if not self._args.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        seconds = {"prompt": (first or start) - start, "answer": time.perf_counter() - (first or start)}
        self._report(stopped, seconds)
        return "".join(pieces)

    def _report(self, stopped: bool, seconds: dict[str, float]) -> None:
        result = self._session.last
        if not self._args.json:
            print(flush=True)
        elif result is not None:
            fields = {**answer_json(result, seconds), "reused_tokens": self._session.reused}
            fields["finish_reason"] = "interrupted" if stopped else result.finish_reason
            print(json.dumps(fields, ensure_ascii=False), flush=True)
