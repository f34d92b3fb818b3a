"""``llama-bench`` of llama.cpp or of a relative, run on a GGUF file: how fast another engine is on this machine."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qtale.bench.gguf_shape import gguf_bytes_per_token
from qtale.errors import Error, InputError

BINARY = "llama-bench"
_TIMEOUT = 1800


def peer_folder() -> Path:
    """Where benchmarks/peers.py builds other engines: "peers" in qtale's part of HuggingFace's asset cache."""
    import huggingface_hub

    return Path(huggingface_hub.cached_assets_path("qtale", "bench", "peers"))


def find_llama_bench(given: str | Path | None = None) -> Path:
    """The program that was given, else that of $PATH, else the one that benchmarks/peers.py built.

    Raises InputError, saying what to do, where there is none.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / BINARY if path.is_dir() else path
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise InputError(f"{given}: is no program; give the path of a {BINARY} that was built from llama.cpp.")
        return path
    found = shutil.which(BINARY)
    if found:
        return Path(found)
    built = sorted(peer_folder().glob(f"llama.cpp*/build/bin/{BINARY}"))
    if built:
        return built[-1]
    raise InputError(
        f"there is no {BINARY} in PATH or {peer_folder()}; run `python benchmarks/peers.py --build`, which builds it "
        "from the package index, or give its path with --peer-path."
    )


@dataclass(frozen=True)
class LlamaBench:
    """One model file behind ``llama-bench``; ``options`` go with every run, as ``("-rtr", "1")``."""

    name: str
    binary: Path
    model: Path
    options: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each decoded token reads, by the file."""
        return gguf_bytes_per_token(self.model)

    def prefill(self, tokens: int, threads: int, repeats: int = 1) -> float:
        """Tokens per second of reading one prompt."""
        return self._run(["-p", str(tokens), "-n", "0"], threads, repeats)

    def decode(self, tokens: int, threads: int, repeats: int = 1) -> float:
        """Tokens per second of one sequence that starts empty."""
        return self._run(["-p", "0", "-n", str(tokens)], threads, repeats)

    def _run(self, what: list[str], threads: int, repeats: int) -> float:
        command = [str(self.binary), "-m", str(self.model), *what, "-t", str(threads), "-r", str(repeats)]
        command += [*self.options, "-o", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            rows = json.loads(done.stdout or "[]")
            return float(statistics.median(rows[0]["samples_ts"]))
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, IndexError, TypeError) as error:
            raise Error(f"{self.name}: {' '.join(command)} gave no result ({error}).") from error
