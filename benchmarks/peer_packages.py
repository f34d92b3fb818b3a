"""Engines that come as wheels, each in an environment of its own: a script beside this file runs there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtale.engine.spec import DecoderSpec
from qtale.errors import Error

SCRIPTS = Path(__file__).parent
TIMEOUT = 900


@dataclass(frozen=True)
class Packaged:
    """A script that makes a random model of the given sizes at 8 or 4 bits, and times it."""

    name: str
    python: Path
    script: Path
    model: Path

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each decoded token reads, as the script counts them in the model's file."""
        return int(self._run("bytes", 0, 1))

    def prefill(self, tokens: int, threads: int, repeats: int = 1) -> float:
        """Tokens per second of reading one prompt."""
        return self._run("prefill", tokens, threads, repeats)

    def decode(self, tokens: int, threads: int, repeats: int = 1) -> float:
        """Tokens per second of one sequence that starts with one token."""
        return self._run("decode", tokens, threads, repeats)

    def _run(self, what: str, tokens: int, threads: int, repeats: int = 1) -> float:
        return float(self.call(what, str(self.model), str(tokens), str(threads), str(repeats)))

    def call(self, *arguments: str) -> str:
        """What the script prints last; raises Error where it fails."""
        environment = {**os.environ, "PYTHONPATH": ""}
        command = [str(self.python), str(self.script), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Error(f"{self.name} did not run: {error}") from error
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Error(f"{self.name} failed with status {done.returncode}: {last}")
        return lines[-1]


def ctranslate2(python: Path, spec: DecoderSpec, work: Path) -> Packaged:
    """CTranslate2 with int8 weights, a scale for each row."""
    model = work / f"ctranslate2-{spec.num_layers}x{spec.hidden_size}"
    peer = Packaged("CTranslate2 int8", python, SCRIPTS / "peer_ctranslate2.py", model)
    if not model.exists():
        sizes = {name: value for name, value in asdict(spec).items() if isinstance(value, (int, float, str, bool))}
        peer.call("make", str(model), json.dumps(sizes))
    return peer


PACKAGES: dict[str, Callable[[Path, DecoderSpec, Path], Any]] = {"ctranslate2": ctranslate2}
