"""Zero-shot accuracy of LSAQ's mixes of INT8 and INT4 layers by two scores: Table I of the paper, on any model.

Layers get 8 bits in the order of each score, the others 4, one scale per channel as in the paper; the engine runs them.
Accuracies of lm-evaluation-harness are kept in ``--work`` as they are found; a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import qtale
from lsaq_mixes import Cache, Methods, Mix
from lsaq_tables import markdown
from output import exit_with, publish
from qtale import InputError
from qtale.engine.engine import load_folder
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadOptions
from qtale.eval.sources import choose
from qtale.eval.tasks import opened_tasks, task_names
from qtale.importance import Importance, MeasureOptions
from qtale.planner.source import Source, open_source
from qtale.spec import COMPUTE

TASKS = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge"
SCORES = ("jaccard", "lim")
# The paper gives accuracies, normalized by length where the harness has that.
KEYS = ("acc_norm,none", "acc,none")


def measured(options: argparse.Namespace, folder: Path) -> Source:
    """The model with its scores, measured where the work folder lacks them."""
    path = options.work / "importance-tasks.json"
    if not path.exists():
        counts = {"num_sequences": options.num_sequences, "seq_len": options.seq_len, "top_k": options.top_k}
        asked = MeasureOptions(metrics=SCORES, **counts)
        qtale.measure(folder, asked, calibration=options.calibration, out=path)
    return open_source(path, folder)


def mixes(methods: Methods, importance: Importance, averages: list[float], group: int | str) -> list[Mix]:
    """The dense model, then every score at every average, the wider ones first."""
    found = [methods.same(16, group, "dense")]
    for average in sorted(averages, reverse=True):
        found += [methods.greedy(importance, score, average, group) for score in SCORES]
    return found


def accuracy(lm: Any, manager: Any, task: str, limit: float | None) -> dict[str, float]:
    """One task's accuracy and its standard error, in percent."""
    import lm_eval

    with contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=limit)
    values = found["results"][task]
    key = next(key for key in KEYS if key in values)
    return {"accuracy": 100 * values[key], "error": 100 * values[key.replace(",", "_stderr,")]}


def loaded(options: argparse.Namespace, source: Source, mix: Mix) -> Any:
    """The model under a mix, rounded while it is read, as lm-eval sees it."""
    from qtale.integrations.engine_lm import EngineLM
    from qtale.integrations.scoring_model import load_tokenizer

    if source.folder is None:
        raise InputError("lsaq_tasks: needs the weights; give a model folder.")
    specs = {}
    for linear in source.shape.linears:
        spec = mix.spec_of(linear.name)
        specs[linear.name] = None if spec is None else spec.resolve(linear.name, linear.in_features)
    run = LoadOptions(options.compute, None, "float32", None, options.threads)
    engine = load_folder(source.folder, WeightOptions(specs=specs), run, progress=False)
    return EngineLM(engine, load_tokenizer(source.folder.path))


def results(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """All rows that were found within the time limit."""
    if source.importance is None:
        raise InputError("lsaq_tasks: the scores are missing; let the benchmark measure them.")
    methods, start = Methods(source, options.work), time.monotonic()
    settings = {"fingerprint": source.model.fingerprint, "limit": options.limit, "compute": options.compute}
    cache = Cache(options.work / "accuracies.json", settings)
    rows, left = [], 0
    with opened_tasks(task_names(options.tasks), choose(options.data)) as (manager, names):
        for mix in mixes(methods, source.importance, options.averages, options.group_size):
            lm: Any = None
            found = {}
            for task in names:
                key = f"{mix.key} {task}"
                over = options.time_limit is not None and time.monotonic() - start > options.time_limit
                if key not in cache.losses and over:
                    left += 1
                    continue
                if key not in cache.losses:
                    lm = lm or loaded(options, source, mix)
                    cache.put(key, accuracy(lm, manager, task, options.limit))
                found[task] = cache.losses[key]
            bits = methods.mean_bits(mix.bits)
            rows.append({"method": mix.method, "average": mix.average, "bits": bits, "tasks": found})
    calibration = {key: source.importance.settings[key] for key in ("num_sequences", "seq_len", "top_k", "seed")}
    return {"settings": {**settings, "tasks": names, "calibration": calibration}, "unfinished": left, "rows": rows}


def render(found: dict[str, Any]) -> str:
    """The table, a line for each mix; the error of the mean is that of independent tasks."""
    names = found["settings"]["tasks"]
    lines = []
    for row in found["rows"]:
        cells = [f"{row['tasks'][name]['accuracy']:.1f}" if name in row["tasks"] else "" for name in names]
        mean = ""
        if len(row["tasks"]) == len(names):
            values = row["tasks"].values()
            error = sum(one["error"] ** 2 for one in values) ** 0.5 / len(names)
            mean = f"{statistics.fmean(one['accuracy'] for one in values):.1f} ± {error:.1f}"
        lines.append([row["method"].removeprefix("greedy "), f"{row['average']:g}", *cells, mean])
    note = f"unfinished: {found['unfinished']} are left; run again to go on\n\n" if found["unfinished"] else ""
    return note + markdown(["score", "bits", *names, "mean"], lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder (default: the demo model)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scores and accuracies lie here")
    parser.add_argument("--data", default="bundled", help="task documents, as for qtale eval")
    parser.add_argument("--calibration", default="bundled", help="as for qtale measure")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--averages", type=float, nargs="+", default=[7.0, 6.0, 5.0], metavar="BITS")
    parser.add_argument("--group-size", default="channel", metavar="channel|N")
    parser.add_argument("--limit", type=float, help="documents a task (default: all)")
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=500)
    parser.add_argument("--compute", choices=COMPUTE, default="float", help="products of quantized layers")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no more tasks after it")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    options = parser.parse_args()
    options.group_size = int(options.group_size) if options.group_size.isdecimal() else options.group_size
    return options


def main() -> int:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = qtale.demo.model() if options.model == "demo" else Path(options.model)
    found = results(options, measured(options, folder))
    publish(found, render(found), options.json)
    return 0


if __name__ == "__main__":
    exit_with(main)
