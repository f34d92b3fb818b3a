"""Calibrated quantization: perplexity, time and memory of every method, beside llm-compressor and GPTQModel.

All are given the very same calibration tokens (``--num-samples`` sequences of ``--seq-len`` from DIR/calibration), the
peers in environments of their own under ``--work`` (``--peers``, installed with pip). Each quantization runs in a
process of its own; what it writes is scored on the first ``--windows`` windows of WikiText-2's test text by qtale's
engine in float32. ``closed`` is the share of the gap in log-perplexity between round to nearest and the dense model
that a method closes. Finished rows lie in ``--work`` and are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qtale
from output import exit_with, publish
from ptq_peers import PEERS, dequantize_gptq, is_gptq
from ptq_table import render
from qtale import Error, InputError, QuantSpec
from qtale.bench.machine import machine
from qtale.files import write_whole

FORMS: dict[str, QuantSpec] = {
    "W4 g64": QuantSpec(4, 64),
    "W3 g64": QuantSpec(3, 64),
    "W4 channel": QuantSpec(4, "channel"),
    "W3 channel": QuantSpec(3, "channel"),
}
# By name, the settings of SolverOptions; tuning is the last step of "auto", which the other row leaves out.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "magr+rtn": {"method": "magr+rtn"},
    "magr+gptq": {"method": "magr+gptq"},
    "auto-untuned": {"method": "auto", "tune_steps": 0},
    "auto": {"method": "auto"},
}
# Untuned "auto" without one of its steps, by the fields of its Recipe; not measured unless asked for.
WITHOUT: dict[str, dict[str, Any]] = {
    "untuned-even": {"even": False},
    "untuned-search": {"search": 1},
    "untuned-order": {"act_order": False},
    "untuned-rounds": {"rounds": 0},
    "untuned-gptq": {"gptq": False},
}
METHODS |= dict.fromkeys(WITHOUT, METHODS["auto-untuned"])
DENSE = "dense"
# A folder of their own: transformers takes kernels.py beside a script for the package of that name.
STEPS = Path(__file__).parent / "quantizers"
WINDOW = 2048


@dataclass(frozen=True)
class Case:
    """One row: who quantizes to what form, with which calibration seed; ``peer`` is empty for qtale."""

    form: str
    method: str
    peer: str = ""
    seed: int | None = None

    @property
    def name(self) -> str:
        return f"{self.peer} {self.method}".strip()


def cases(options: argparse.Namespace) -> list[Case]:
    """Every row that is asked for; what uses no calibration has no seed."""
    found = [Case("", DENSE)]
    for form in options.forms:
        found.append(Case(form, "rtn"))
        for seed in range(options.seeds):
            found += [Case(form, method, seed=seed) for method in options.methods if method != "rtn"]
            for peer in options.peers:
                shared = [method for method in PEERS[peer].methods if method in options.methods]
                found += [Case(form, method, peer, seed) for method in shared]
    return found


class Runs:
    """What it takes to measure a row, and the rows that were measured before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.model = qtale.demo.model() if options.model == "demo" else Path(options.model).resolve()
        self.path = self.work / "rows.json"
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.settings = {
            "fingerprint": qtale.checkpoint.fingerprint(self.model),
            "windows": options.windows,
            "window_tokens": options.window_tokens,
            "threads": options.threads,
        }
        self.text = _windows(self.model, options)

    def find(self, case: Case) -> dict[str, Any] | None:
        """The finished row of a case under the settings of this run."""
        wanted = self._key(case)
        return next((row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def measure(self, case: Case) -> None:
        """Quantize in a process of its own, score what it wrote, and keep the row."""
        row = {**self._key(case), "load": os.getloadavg()[0]}
        folder = self.work / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if case.method == DENSE:
            written = self.model
        else:
            written = folder / "quantized"
            row.update(self._quantize(case, written))
        row["bytes"] = sum(path.stat().st_size for path in written.glob("*.safetensors"))
        if is_gptq(written):
            written = dequantize_gptq(written, folder / "dense")
        row["perplexity"] = self._perplexity(written)
        self.rows.append(row)
        write_whole(self.path, json.dumps(self.rows, indent=1) + "\n")
        shutil.rmtree(folder)

    def _key(self, case: Case) -> dict[str, Any]:
        key = {**asdict(case), **self.settings}
        if case.seed is not None:
            key.update(num_samples=self.options.num_samples, seq_len=self.options.seq_len)
        if case.peer:
            key["dtype"] = self.options.peer_dtype
        return key

    def _quantize(self, case: Case, out: Path) -> dict[str, Any]:
        script, python = "run_qtale.py", Path(sys.executable)
        if case.peer:
            script, python = PEERS[case.peer].script, PEERS[case.peer].python(self.work)
        asked = {"model": str(self.model), "out": str(out), "spec": _plain(FORMS[case.form])}
        asked.update(tokens=self._tokens(case), threads=self.options.threads, method=case.method)
        asked.update(dtype=self.options.peer_dtype, result=str(out.parent / "figures.json"))
        if not case.peer:
            asked["options"] = {**METHODS[case.method], **({} if case.seed is None else {"seed": case.seed})}
            asked["recipe"] = WITHOUT.get(case.method, {})
        log = self.work / "logs" / f"{case.form} {case.name} {case.seed}.log".replace(" ", "-")
        log.parent.mkdir(exist_ok=True)
        environment = _environment(bool(case.peer), self.options.threads)
        command = [str(python), str(STEPS / script), json.dumps(asked)]
        with log.open("wb") as said:
            done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise Error(f"{case.name} at {case.form} failed with status {done.returncode}; see {log}.")
        return dict(json.loads(Path(asked["result"]).read_text(encoding="utf-8")))

    def _tokens(self, case: Case) -> str | None:
        """The file of the calibration tokens, int64 [sequences, length], drawn with the case's seed."""
        import numpy as np

        from qtale.integrations.calibration import calibrate

        if case.seed is None:
            return None
        counts = (self.options.num_samples, self.options.seq_len)
        path = self.work / f"tokens-{counts[0]}x{counts[1]}-{case.seed}.npy"
        if not path.exists():
            np.save(path, calibrate(self.model, self.options.calibration, *counts, seed=case.seed).tokens)
        return str(path)

    def _perplexity(self, folder: Path) -> float:
        threads = self.options.threads
        with qtale.load(folder, compute="float", kv_dtype="float32", num_threads=threads, progress=False) as engine:
            return engine.perplexity(self.text, self.options.window_tokens)


def _plain(spec: QuantSpec) -> dict[str, Any]:
    return {"num_bits": spec.num_bits, "group_size": spec.group_size, "symmetric": spec.symmetric}


def _environment(peer: bool, threads: int) -> dict[str, str]:
    count = str(threads)
    found = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": count, "GPTQMODEL_CPU_WORKERS": count}
    return {**found, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"} if peer else found


def _windows(model: Path, options: argparse.Namespace) -> list[int]:
    """The tokens of the first windows of WikiText-2's test text."""
    from transformers import AutoTokenizer

    path = options.data / "wikitext2" / "wiki.test.raw"
    count = options.windows * options.window_tokens
    text = path.read_text(encoding="utf-8")[: 16 * count]
    tokens: list[int] = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False).input_ids[:count]
    if len(tokens) < count:
        raise InputError(f"ptq: {path} has too few tokens for {options.windows} windows; ask for fewer.")
    return tokens


def run(runs: Runs, todo: list[Case], limit: float | None) -> int:
    """Measure what is missing until the time is over; returns how many rows are left."""
    from tqdm.auto import tqdm

    start = time.monotonic()
    missing = [case for case in todo if runs.find(case) is None]
    with tqdm(missing, desc="ptq", unit="row", file=sys.stderr) as bar:
        for done, case in enumerate(bar):
            if limit is not None and time.monotonic() - start > limit:
                return len(missing) - done
            bar.set_postfix_str(f"{case.form} {case.name}")
            runs.measure(case)
    return 0


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known; use {', '.join(known)}")
        return found

    return read


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with wikitext2/ and calibration/")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="rows, tokens and peers lie here")
    parser.add_argument("--calibration", metavar="FILE", help="a text (default: DIR/calibration/exllamav3_c4.utf8)")
    parser.add_argument("--forms", type=_names(FORMS), default=list(FORMS), metavar="A,B", help=", ".join(FORMS))
    parser.add_argument(
        "--methods",
        type=_names(METHODS),
        default=[name for name in METHODS if name not in WITHOUT],
        metavar="A,B",
        help=", ".join(METHODS),
    )
    parser.add_argument("--peers", type=_names(PEERS), default=[], metavar="A,B", help=", ".join(PEERS))
    parser.add_argument("--peer-dtype", default="float32", help="of llm-compressor (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds, for the spread")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window-tokens", type=int, default=WINDOW)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no more rows after it")
    parser.add_argument("--quick", action="store_true", help="few short sequences: shows that it runs")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(num_samples=4, seq_len=32, windows=1, window_tokens=64)
    return options


def main() -> int:
    options = parse()
    if min(options.seeds, options.windows, options.num_samples, options.threads) < 1 or options.window_tokens < 2:
        raise InputError("ptq: counts must be 1 or more, --window-tokens 2 or more.")
    options.calibration = options.calibration or options.data / "calibration" / "exllamav3_c4.utf8"
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    runs = Runs(options)
    todo = cases(options)
    left = run(runs, todo, options.time_limit)
    found: dict[str, Any] = {"benchmark": "ptq", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine()}
    rows = [row for case in todo if (row := runs.find(case)) is not None]
    found.update(settings=runs.settings, unfinished=left, rows=rows)
    publish(found, render(found), options.json)
    return 0


if __name__ == "__main__":
    exit_with(main)
