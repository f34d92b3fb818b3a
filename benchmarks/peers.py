"""Other engines on the same shapes and machine: tokens per second and bytes per second; see README.md."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import peer_builds
from output import publish
from peer_packages import PACKAGES
from qtale import _core, demo
from qtale.bench import LlamaBench, machine, machine_lines, write_shape
from qtale.bench.run import Peer
from qtale.checkpoint.folder import open_folder
from qtale.engine.spec import DecoderSpec, read_spec
from qtale.errors import Error
from random_models import TINY, TINYLLAMA

MEMORY = 256 << 20  # bytes read for the limit
SHAPES = {"1.1b": TINYLLAMA, "tiny": TINY}
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Which peers: where they are built, where the sources of ik_llama.cpp are, file types, packages with venvs."""

    cache: Path | None = None
    source: Path | None = None
    ik: Path | None = None
    kinds: tuple[str, ...] = ("Q4_0", "Q8_0")
    packages: tuple[tuple[str, Path], ...] = field(default=())


def spec_of(model: str) -> DecoderSpec:
    """The sizes of a shape of ``SHAPES``, of the demo model, or of a folder."""
    if model in SHAPES:
        return read_spec(SHAPES[model].config(), model)
    folder = open_folder(demo.model() if model == "demo" else model)
    return read_spec(folder.config, str(folder.path))


def model_files(model: str, kinds: Sequence[str], programs: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """GGUF files of a model: the demo's own and what llama-quantize makes of it, else random ones of the same shape."""
    if model == "demo":
        yield "Q4_1", demo.gguf_file()
        kinds = [kind for kind in kinds if kind != "Q4_0"]
    for kind in kinds:
        path = work / f"{model}-{kind}.gguf"
        if not path.exists():
            if model != "demo" and kind in ("Q4_0", "Q8_0", "F16"):
                write_shape(path, spec_of(model), kind)
            else:
                source = demo.gguf_file() if model == "demo" else write_shape(work / "F16.gguf", spec_of(model), "F16")
                quantize = programs / "llama-quantize"
                peer_builds.run([quantize, "--allow-requantize", source, path, kind], work / "quantize.log")
        yield kind, path


def llamas(model: str, choice: Choice, work: Path) -> Iterator[Peer]:
    """llama.cpp and, where its sources are given, ik_llama.cpp, which are built first."""
    programs = peer_builds.llama_cpp(choice.cache, choice.source)
    ik = peer_builds.ik_llama_cpp(choice.ik, choice.cache) if choice.ik else None
    for kind, path in model_files(model, choice.kinds, programs, work):
        yield LlamaBench(f"llama.cpp {kind}", programs / "llama-bench", path)
        if ik:
            yield LlamaBench(f"ik_llama.cpp {kind} -rtr 1", ik / "llama-bench", path, ("-rtr", "1"))


def peers(model: str, choice: Choice, work: Path) -> list[Peer]:
    """All peers that are to be had, with the model's shape; those that are not are named on stderr with the reason."""
    found = list(llamas(model, choice, work)) if choice.kinds else []
    for name, python in choice.packages:
        try:
            found.append(PACKAGES[name](python, spec_of(model), work))
        except Error as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    return found


def measure(peer: Peer, threads: int, prefill: int, decode: int, repeats: int) -> Row:
    """Rates of one peer between two measurements of the memory limit."""
    _core.set_num_threads(threads)
    limits = [_core.measure_memory(MEMORY, 5)[0]]
    reading = [peer.prefill(prefill, threads) for _ in range(repeats)]
    rates = []
    for _ in range(repeats):
        rates.append(peer.decode(decode, threads))
        limits.append(_core.measure_memory(MEMORY, 5)[0])
    rate, limit = statistics.median(rates), statistics.median(limits)
    return {
        "peer": peer.name,
        "threads": threads,
        "prefill": {"tokens": prefill, "tokens_per_second": statistics.median(reading)},
        "decode": {"tokens": decode, "tokens_per_second": rate},
        "bytes_per_token": peer.bytes_per_token,
        "read": limit,
        "share_of_read": rate * peer.bytes_per_token / limit,
    }


def line(row: Row) -> str:
    """One peer on some threads, for people."""
    rate = row["decode"]["tokens_per_second"]
    speed = rate * row["bytes_per_token"] / 1e9
    return (
        f"{row['peer']:26} {row['threads']:7} {row['prefill']['tokens_per_second']:12.1f} {rate:11.1f} "
        f"{row['bytes_per_token'] / 1e6:9.0f} {speed:6.1f} {row['share_of_read']:12.2f}"
    )


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    lines = [*machine_lines(result["machine"]), ""]
    lines.append("peer                       threads  prefill t/s  decode t/s  MB/token   GB/s  of the read")
    return "\n".join([*lines, *map(line, result["results"])])


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which peers are measured."""
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where they are built (default: HuggingFace's cache)")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="sources of llama.cpp instead of the index's")
    parser.add_argument("--ik", type=Path, metavar="DIR", help="sources of ik_llama.cpp, to be built and measured too")
    parser.add_argument("--kinds", default="Q4_0,Q8_0", metavar="K[,K…]", help="types, or '' (default: %(default)s)")
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a package ({', '.join(PACKAGES)}) and the Python of an environment that has it; repeatable",
    )


def choice_of(args: argparse.Namespace) -> Choice:
    """The choice that the options make; raises Error for packages that are not known."""
    packages = []
    for text in args.package:
        name, _, python = text.partition("=")
        if name not in PACKAGES or not python:
            raise Error(f"--package {text}: use NAME=PYTHON with a NAME of {', '.join(PACKAGES)}.")
        packages.append((name, Path(python)))
    return Choice(args.cache, args.llama_cpp, args.ik, tuple(filter(None, args.kinds.split(","))), tuple(packages))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", action="store_true", help="build them and stop")
    parser.add_argument("--model", default="1.1b", metavar="M", help="1.1b (random weights), demo, or a model folder")
    parser.add_argument("--threads", default="1,2", metavar="N[,N…]")
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens that are decoded")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON to FILE; '-' is standard output")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the random models in DIR for the next run")
    add_peer_arguments(parser)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All results as one JSON object."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        found = peers(args.model, choice_of(args), args.work or Path(temporary))
        runs = [(peer, threads) for threads in map(int, args.threads.split(",")) for peer in found]
        for peer, threads in tqdm(runs, desc="peers", file=sys.stderr):
            rows.append(measure(peer, threads, args.prefill, args.decode, args.repeat))
            tqdm.write(line(rows[-1]), file=sys.stderr)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"benchmark": "peers", "time": stamp, "machine": machine(), "model": args.model, "results": rows}


def main() -> int:
    """Builds, measures, prints; 1 after an error."""
    args = parse_arguments()
    try:
        if args.build:
            print(peer_builds.llama_cpp(args.cache, args.llama_cpp))
            if args.ik:
                print(peer_builds.ik_llama_cpp(args.ik, args.cache))
            return 0
        result = run(args)
    except (Error, ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks/peers.py: error: {error}", file=sys.stderr)
        return 1
    publish(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
