"""Engines that come as wheels, each in an environment of its own: a script beside this file runs there."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from qtale.engine.spec import DecoderSpec
from qtale.errors import Error
from random_models import Shape, write_dense

SCRIPTS = Path(__file__).parent
TIMEOUT = 900


@dataclass(frozen=True)
class Packaged:
    """A script that makes a random model of the given sizes at 8 or 4 bits, and times it."""

    name: str
    python: Path
    script: Path
    model: Path

    @cached_property
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


def shape_of(spec: DecoderSpec) -> Shape:
    """The sizes of a model with heads of hidden_size / num_heads."""
    return Shape(
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_layers,
        spec.num_heads,
        spec.num_kv_heads,
        spec.vocab_size,
        spec.positions,
    )


def converted(title: str, script: str, bits: int) -> Callable[[Path, DecoderSpec, Path], Packaged]:
    """A package with a converter of its own, whose script makes models of ``bits`` bits from a dense folder."""

    def peer_of(python: Path, spec: DecoderSpec, work: Path) -> Packaged:
        model = work / f"{Path(script).stem}-{bits}-{spec.num_layers}x{spec.hidden_size}"
        peer = Packaged(f"{title} int{bits}", python, SCRIPTS / script, model.absolute())
        if not model.exists():
            work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=work) as temporary:
                dense = write_dense(Path(temporary).absolute() / "dense", shape_of(spec))
                peer.call("make", str(peer.model), str(dense), str(bits))
        return peer

    return peer_of


PACKAGES: dict[str, Callable[[Path, DecoderSpec, Path], Packaged]] = {
    "ctranslate2": ctranslate2,
    "openvino": converted("OpenVINO", "peer_openvino.py", 4),
    "openvino-int8": converted("OpenVINO", "peer_openvino.py", 8),
    "onnxruntime": converted("onnxruntime-genai", "peer_onnxruntime.py", 4),
    "onnxruntime-int8": converted("onnxruntime-genai", "peer_onnxruntime.py", 8),
}
