"""Runs where onnxruntime-genai and transformers are: `make FOLDER DENSE BITS`, `prefill|decode|bytes FOLDER TOKENS …`.

The latter go on with THREADS REPEATS. Weights are symmetric in groups of 128 (its default of 32 is slower), the head's
too, and multiplied in int8 (accuracy level 4, its default here); logits are those of the last token only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai

from peer_script import Timed, run

OPTIONS = ("block_size=128", "accuracy_level=4", "prune_lm_head=true", "hf_token=false")
SHORT = 4


def make(folder: str, dense: str, bits: str) -> None:
    """Converts a folder of transformers; the working directory does not count, since names there would hide modules."""
    partial = Path(folder + ".partial")
    command = [sys.executable, "-I", "-m", "onnxruntime_genai.models.builder", "-i", dense, "-o", str(partial)]
    choices = ("-p", f"int{bits}", "-e", "cpu", "-c", str(partial / "cache"), "--extra_options", *OPTIONS)
    done = subprocess.run([*command, *choices], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    partial.rename(folder)


def bytes_of(folder: str) -> int:
    """Bytes of the matrices and their scales, the head's with them."""
    graph = onnx.load(Path(folder) / "model.onnx", load_external_data=False).graph
    sizes = {
        tensor.name: int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    return sum(sizes.get(name, 0) for node in graph.node if node.op_type == "MatMulNBits" for name in node.input)


def timed(what: str, folder: str, tokens: int, threads: int) -> Timed:
    """Reading a prompt, or decoding so many tokens after the first that follows a short prompt."""
    config = onnxruntime_genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)
    words = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["vocab_size"]
    random = np.random.default_rng(0)
    length, new = (tokens, 0) if what == "prefill" else (SHORT, tokens)

    def seconds() -> float:
        parameters = onnxruntime_genai.GeneratorParams(model)
        end = length + new + 1
        parameters.set_search_options(max_length=end, min_length=end, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(random.integers(3, words, length, np.int32))
        generator.generate_next_token()
        if what == "prefill":
            return time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return time.perf_counter() - start

    return seconds


if __name__ == "__main__":
    run(make, bytes_of, timed)
