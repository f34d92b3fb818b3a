"""Zero-shot scoring: the engine beside lm-evaluation-harness's own HFLM on the same documents; see README.md.

Every way runs in a process of its own, in turn with the others. What is timed is the harness's call of
``loglikelihood``: from the texts of all requests to their answers, without imports and loading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import qtale
from output import publish
from qtale import QuantSpec, _core
from qtale.bench import machine
from qtale.errors import Error
from qtale.eval import EvalOptions
from qtale.eval.sources import choose
from qtale.eval.tasks import opened_tasks, task_names

TASKS = "arc_easy,piqa"
ENGINE: dict[str, tuple[QuantSpec | None, str]] = {
    "engine dense": (None, "float"),
    "engine bfloat16": (None, "bfloat16"),
    "engine W8": (QuantSpec(8, "channel"), "int16"),
    "engine W4": (QuantSpec(4, "auto"), "int16"),
    "engine W4, int8": (QuantSpec(4, "auto"), "int8"),
}
BATCHES = (1, 8, 32)  # lm-eval's default first
TARGET = 5.0
Row = dict[str, Any]


def cases(batches: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Everything that is compared, by name; HFLM in bfloat16 where the CPU multiplies it."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    types = ["float32", *(["bfloat16"] if "avx512_bf16" in flags or "amx_bf16" in flags else [])]
    names = [name for name, (_, compute) in ENGINE.items() if compute != "bfloat16" or _core.has_bfloat16()]
    found: dict[str, dict[str, Any]] = {name: {"engine": name} for name in names}
    found |= {f"hf {dtype}, batch {size}": {"dtype": dtype, "batch": size} for dtype in types for size in batches}
    return found


def hf_lm(folder: Path, case: dict[str, Any]) -> Any:
    """lm-eval's model as ``lm_eval --model hf`` makes it."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype=case["dtype"], device="cpu", batch_size=case["batch"])


def engine_lm(folder: Path, name: str, threads: int) -> Any:
    """The model of ``qtale eval --backend engine``."""
    from qtale.eval.backend import engine_lm as make

    spec, compute = ENGINE[name]
    return make(EvalOptions((TASKS,), backend="engine", threads=threads, compute=compute), folder, spec)


@contextlib.contextmanager
def timed(lm: Any) -> Iterator[dict[str, float]]:
    """Seconds of the clock and of the processor inside ``loglikelihood``, and its requests."""
    spent = {"seconds": 0.0, "cpu_seconds": 0.0, "requests": 0}
    original = lm.loglikelihood

    def loglikelihood(requests: Any, *args: Any, **options: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return original(requests, *args, **options)
        finally:
            spent["seconds"] += time.perf_counter() - start
            spent["cpu_seconds"] += time.process_time() - cpu
            spent["requests"] += len(requests)

    lm.loglikelihood = loglikelihood
    yield spent


def work(options: argparse.Namespace, folder: Path) -> Row:
    """One case in this process."""
    import lm_eval
    import torch

    torch.set_num_threads(options.threads)
    case = json.loads(options.worker)
    lm = engine_lm(folder, case["engine"], options.threads) if "engine" in case else hf_lm(folder, case)
    with (
        contextlib.redirect_stdout(sys.stderr),
        opened_tasks(task_names(options.tasks), choose(options.data)) as (manager, names),
        timed(lm) as spent,
    ):
        found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, limit=options.limit)
    accuracies = {
        name: {key: found["results"][name].get(f"{key},none") for key in ("acc", "acc_norm")} for name in names
    }
    documents = sum(found["n-samples"][name]["effective"] for name in names)
    return {**spent, "documents": documents, "accuracies": accuracies}


def sample(options: argparse.Namespace, case: dict[str, Any]) -> Row:
    """One case in a process of its own, which OpenMP's settings of ours do not reach."""
    kept = ("model", "tasks", "data", "limit", "threads")
    given = [f"--{name}={getattr(options, name)}" for name in kept]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
    # Threads that spin between operations take processors from others on a machine that is not quiet.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, *given, f"--worker={json.dumps(case)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Error(f"{case}: the process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def summary(name: str, samples: Sequence[Row], all_samples: dict[str, list[Row]]) -> Row:
    """Medians of one case, and how much faster it was than the default and the best HFLM of each type."""
    middle = {key: statistics.median(one[key] for one in samples) for key in ("seconds", "cpu_seconds")}
    row: Row = {"name": name, **middle, "samples": len(samples)}
    row |= {key: samples[0][key] for key in ("requests", "documents", "accuracies")}
    row["requests_per_second"] = row["requests"] / row["seconds"]
    row["faster"] = {}
    for dtype in ("float32", "bfloat16"):
        peers = [found for peer, found in all_samples.items() if peer.startswith(f"hf {dtype}")]
        for what, key in (("", "seconds"), (" (CPU time)", "cpu_seconds")):
            ratios = [[other[key] / own[key] for own, other in zip(samples, peer, strict=True)] for peer in peers]
            middles = [statistics.median(ratio) for ratio in ratios]
            if middles:
                row["faster"] |= {f"{dtype}, default{what}": middles[0], f"{dtype}, best{what}": min(middles)}
    row["target"] = TARGET if name in ENGINE else None
    return row


def render(result: Row) -> str:
    """The rows as a Markdown table."""
    rows = result["results"]
    columns = [key for key in rows[0]["faster"] if "CPU" not in key]
    tasks = list(rows[0]["accuracies"])
    head = ["", "seconds", "CPU seconds", "requests/s", *tasks, *(f"over hf {column}" for column in columns)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["name"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['requests_per_second']:.1f}"]
        cells += [
            " / ".join(f"{value:.3f}" for value in row["accuracies"][task].values() if value is not None)
            for task in tasks
        ]
        cells += [f"{row['faster'][column]:.1f} ({row['faster'][f'{column} (CPU time)']:.1f})" for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    about = result["machine"]
    first = f"{about['cpu']}, {about['isa']}, {about['threads']} threads; {rows[0]['documents']} documents"
    return "\n".join([f"{first}; accuracies are acc / acc_norm; ratios of time (of CPU time)", "", *lines])


def run(options: argparse.Namespace) -> Row:
    """All cases, one after the other in every round."""
    chosen = cases([int(size) for size in options.batches.split(",")])
    wanted = {name: case for name, case in chosen.items() if not options.only or any(o in name for o in options.only)}
    samples: dict[str, list[Row]] = {name: [] for name in wanted}
    with tqdm(total=options.repeat * len(wanted), desc="cases", file=sys.stderr) as bar:
        for _ in range(options.repeat):
            for name, case in wanted.items():
                samples[name].append(sample(options, case))
                bar.write(f"{name}: {samples[name][-1]['seconds']:.1f} s", file=sys.stderr)
                bar.update()
    settings = {key: getattr(options, key) for key in ("model", "tasks", "data", "limit", "batches", "repeat")}
    rows = [summary(name, found, samples) for name, found in samples.items()]
    return {
        "benchmark": "eval_speed",
        "machine": machine() | {"threads": options.threads},
        "settings": settings,
        "results": rows,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a dense folder, or demo")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--data", default="bundled", help="as for qtale eval")
    parser.add_argument("--limit", type=int, default=250, help="documents a task (default 250)")
    parser.add_argument("--threads", type=int, default=_core.num_threads())
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="N[,N…]", help="of HFLM")
    parser.add_argument("--repeat", type=int, default=1, help="rounds of all cases (default 1: HFLM takes minutes)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases with TEXT in their names; repeatable")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measures and prints the table, or one case as JSON in a process of its own; 1 after an error."""
    options = parse()
    try:
        if options.worker:
            folder = qtale.demo.model() if options.model == "demo" else Path(options.model)
            print(json.dumps(work(options, folder)))
        else:
            result = run(options)
            publish(result, render(result), options.json)
    except Error as error:
        print(f"eval_speed: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
