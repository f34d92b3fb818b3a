"""Calibrated quantization of layers in the shape of a 1.1B Llama, random weights and tokens: time and peak memory.

One layer says it all: layers are solved one after another, so time grows with their number and memory does not. The
share compares the multiply-adds that are done, times two, with what the float32 FMA units could have done in the same
CPU time; products in bfloat16, where the processor has them, may go beyond that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import qtale
from output import exit_with, publish
from qtale import QuantSpec, SolverOptions, _core
from qtale.bench.machine import machine
from qtale.checkpoint import open_folder
from qtale.checkpoint.writer import ShardWriter, TensorShape
from qtale.memory import parse_size
from qtale.ptq.estimate import estimate
from qtale.ptq.worklist import list_work
from random_models import STD, TINY, TINYLLAMA, Shape


def write_dense(folder: Path, shape: Shape) -> Path:
    """A float16 folder of random weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    matrices = [(f"{name}.weight", size) for name, size in shape.matrices()]
    matrices += [(name, (shape.vocab, shape.hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    tensors = [TensorShape(name, "F16", size) for name, size in matrices]
    tensors += [TensorShape(name, "F16", (shape.hidden,)) for name in shape.norms()]
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "model.safetensors", tensors, {"format": "pt"}) as writer:
        for name, size in matrices:
            values = generator.standard_normal(size, dtype=np.float32)
            writer.write(name, (values * (1.0 if "embed" in name else STD)).astype(np.float16))
        for name in shape.norms():
            writer.write(name, np.ones(shape.hidden, np.float16))
    return folder


def measure(arguments: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Any]:
    """Quantize and say what it took."""
    model = write_dense(folder / "model", shape)
    options = SolverOptions(arguments.method, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
    spec, budget = QuantSpec(arguments.bits, arguments.group_size), parse_size(arguments.max_memory, "--max-memory")
    size = (arguments.num_samples, arguments.seq_len)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, size)
    wall, cpu = time.perf_counter(), time.process_time()
    qtale.quantize(model, folder / "out", spec, method=options, tokens=tokens, max_memory=budget)
    seconds, busy = time.perf_counter() - wall, time.process_time() - cpu
    opened = open_folder(model)
    operations = estimate(opened, list_work(opened, spec, {}).rows, options, budget).operations
    peak = _core.measure_peak("f32_fma", 1.0)
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "operations": operations,
        "f32_fma_peak": peak,
        "share": operations / busy / peak,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--method", default="gptq", help="of qtale quantize (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-memory", default="256MiB", help="hidden states in memory before files")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    return parser.parse_args()


def main() -> int:
    import torch

    arguments = parse()
    shape = replace(TINY if arguments.quick else TINYLLAMA, layers=arguments.layers)
    if arguments.quick:
        arguments.num_samples, arguments.seq_len = 4, 64
    torch.set_num_threads(arguments.threads)
    _core.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, shape, Path(folder))
    text = (
        f"{arguments.method}, {arguments.layers} layer(s) of {shape.hidden} and {shape.between}, "
        f"{arguments.num_samples} x {arguments.seq_len} tokens: {found['seconds']:.0f} s, "
        f"{found['cpu_seconds']:.0f} s of CPU time, peak {found['peak_bytes'] / 2**20:.0f} MiB, "
        f"{found['operations'] / 1e12:.1f} Tflop, {found['share']:.0%} of {found['f32_fma_peak'] / 1e9:.0f} Gflop/s"
    )
    publish({"benchmark": "ptq_shape", "machine": machine(), **vars(arguments), **found}, text, arguments.json)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    exit_with(main)
