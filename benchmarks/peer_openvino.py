"""Runs where openvino-genai and optimum-intel are: `make FOLDER DENSE BITS`, `prefill|decode|bytes FOLDER TOKENS …`.

The latter go on with THREADS REPEATS. Weights of 4 bits are symmetric in groups of 128, those of the head have 8 bits;
of 8 bits they have a scale for each row: what optimum-cli makes of a model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from peer_script import Timed, run

FORMATS = {"4": ("--weight-format", "int4", "--group-size", "128", "--sym"), "8": ("--weight-format", "int8")}
# Activations are rounded in the weights' groups: its default of 32 takes 1.4 times as long here.
OPTIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
DECOMPRESSION = ("Constant", "Convert", "Subtract", "Multiply", "Reshape")
SHORT = 4


def make(folder: str, dense: str, bits: str) -> None:
    """Converts a folder of transformers; the working directory does not count, since names there would hide modules."""
    export = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", dense)
    partial = Path(folder + ".partial")
    task = ("--task", "text-generation-with-past")
    done = subprocess.run([sys.executable, "-I", *export, *task, *FORMATS[bits], str(partial)], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    partial.rename(folder)


def weight_bytes(node: openvino.Node) -> int:
    """Bytes of the constants that a weight is computed from, scales and zeros with it; 0 if anything else is."""
    if node.get_type_name() not in DECOMPRESSION:
        return 0
    if node.get_type_name() == "Constant":
        return node.get_element_type().bitwidth * int(np.prod(node.get_shape())) // 8
    values = node.input_values()[: 1 if node.get_type_name() == "Reshape" else None]
    return sum(weight_bytes(value.get_node()) for value in values)


def bytes_of(folder: str) -> int:
    """Bytes of the matrices, the head's with them."""
    model = openvino.Core().read_model(Path(folder) / "openvino_model.xml")
    products = (node for node in model.get_ops() if node.get_type_name() == "MatMul")
    return sum(weight_bytes(node.input_value(1).get_node()) for node in products)


def timed(what: str, folder: str, tokens: int, threads: int) -> Timed:
    """Reading a prompt, or decoding so many tokens after the first that follows a short prompt."""
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads, **OPTIONS)
    generator, words = np.random.default_rng(0), json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    new = 1 if what == "prefill" else tokens + 1
    config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)

    def seconds() -> float:
        # Other tokens each time: what it has read before, it keeps.
        prompt = generator.integers(3, words, (1, tokens if what == "prefill" else SHORT))
        start = time.perf_counter()
        result = pipeline.generate(openvino.Tensor(prompt), config)
        if what == "prefill":
            return time.perf_counter() - start
        times = result.perf_metrics.raw_metrics.m_new_token_times
        return (times[-1] - times[0]) / 1e3

    return seconds


if __name__ == "__main__":
    run(make, bytes_of, timed)
