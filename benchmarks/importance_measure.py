"""``qtale measure`` beside the same scores from plain transformers: time and peak memory, each in a process of its own.

Both compute in float32 with the same threads on the same tokens. Plain transformers holds the whole model and gets its
hidden states from ``output_hidden_states``; the scores are all that need no gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("qtale", "transformers")
BITS = (8, 4, 3, 2)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def with_qtale(model: str, tokens: np.ndarray) -> dict[str, list[float]]:
    from qtale.importance import MeasureOptions, measure_tokens
    from qtale.importance.options import HIDDEN_METRICS, WEIGHT_METRICS

    options = MeasureOptions(metrics=(*HIDDEN_METRICS, *WEIGHT_METRICS), group_size="channel")
    importance = measure_tokens(model, tokens, options, progress=False)
    return {metric: list(scores) for metric, scores in importance.scores.items()}


def with_transformers(path: str, tokens: np.ndarray) -> dict[str, list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    from qtale.importance import MeasureOptions

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    layers, matrix, k = model.model.layers, model.get_input_embeddings().weight, MeasureOptions().top_k
    last: list[Any] = []
    layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    scores: dict[str, list[Any]] = {"jaccard": [], "lim": [], "bi": []}
    with torch.inference_mode():
        for ids in torch.from_numpy(tokens).split(2):
            last.clear()
            states = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states
            states = torch.stack([*states[:-1], last[0]])  # the last one that transformers gives is normed
            cosines = torch.cosine_similarity(states[:-1], states[1:], dim=-1)
            scores["lim"].append(-cosines[:, :, -1])
            scores["bi"].append(1 - cosines.mean(2))
            best = (states[:, :, -1] @ matrix.T).topk(k).indices.tolist()
            pairs = [itertools.pairwise([set(row[at]) for row in best]) for at in range(len(ids))]
            found = [[1 - len(a & b) / len(a | b) for a, b in sequence] for sequence in pairs]
            scores["jaccard"].append(torch.tensor(found, dtype=torch.float64).T)
        means = {metric: torch.cat(parts, 1).double().mean(1).tolist() for metric, parts in scores.items()}
        means["zd"] = [-_zd(layer) for layer in layers]
        means["error"] = [_error(layer) for layer in layers]
    return means


def _weights(layer: Any) -> list[Any]:
    import torch

    return [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def _zd(layer: Any) -> float:
    import torch

    flat = torch.cat([weight.flatten() for weight in _weights(layer)])
    return float((flat > flat.mean() + flat.std(correction=0)).float().mean())


def _error(layer: Any) -> float:
    """At 4 bits per channel; the other widths are what importance.json keeps beside it."""
    found = {}
    for bits in BITS:
        errors = norms = 0.0
        for weight in _weights(layer):
            scale = (weight.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)).half().float()
            codes = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            errors += float((codes * scale - weight).square().sum())
            norms += float(weight.square().sum())
        found[bits] = (errors / norms) ** 0.5
    return found[4]


def child(arguments: argparse.Namespace) -> int:
    import torch

    from qtale import _core

    torch.set_num_threads(arguments.threads)
    _core.set_num_threads(arguments.threads)
    import transformers.models.llama.modeling_llama  # noqa: F401 - both need it, neither is charged for it

    tokens, before = np.load(arguments.tokens), time.perf_counter()
    start = time.process_time()
    scores = (with_qtale if arguments.way == "qtale" else with_transformers)(arguments.model, tokens)
    seconds = {"seconds": time.perf_counter() - before, "cpu_seconds": time.process_time() - start}
    print(json.dumps({"way": arguments.way, **seconds, "peak_bytes": peak_bytes(), "scores": scores}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder (default: the demo model)")
    parser.add_argument("--calibration", default="bundled", help="as for qtale measure")
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    return parser.parse_args()


def _apart(a: list[float], b: list[float]) -> float:
    return float(np.abs(np.subtract(a, b)).max())


def run(arguments: argparse.Namespace, way: str, tokens: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--model", arguments.model, "--tokens", str(tokens)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*command, "--threads", str(arguments.threads)], stdout=subprocess.PIPE, check=True, env=environment
    )
    return dict(json.loads(done.stdout))


def main() -> int:
    import tempfile

    from qtale import demo
    from qtale.integrations.calibration import calibrate

    arguments = parse()
    if arguments.way:
        return child(arguments)
    arguments.model = str(demo.model()) if arguments.model == "demo" else arguments.model
    drawn = calibrate(Path(arguments.model), arguments.calibration, arguments.num_sequences, arguments.seq_len, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", drawn.tokens)
        results = [run(arguments, way, Path(folder) / "tokens.npy") for way in WAYS]
    for result in results:
        seconds, cpu, peak = result["seconds"], result["cpu_seconds"], result["peak_bytes"] / 2**20
        print(f"{result['way']:12} {seconds:8.1f} s  {cpu:8.1f} s of CPU time  peak {peak:7.0f} MiB")
    ours, plain = results
    time_ratio, memory_ratio = (ours[key] / plain[key] for key in ("seconds", "peak_bytes"))
    print(f"qtale takes {time_ratio:.2f} of the time and {memory_ratio:.2f} of the memory")
    apart = {name: _apart(ours["scores"][name], scores) for name, scores in plain["scores"].items()}
    print("largest difference of a score: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    if arguments.json:
        text = json.dumps({"threads": arguments.threads, "results": results, "apart": apart}, indent=2)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
