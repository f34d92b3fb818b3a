"""How fast the engine runs a model, beside what the machine can do at that moment and beside other engines."""

from qtale.bench.figures import Row, batches, decode, prefill, table
from qtale.bench.gguf_shape import gguf_bytes_per_token, write_shape
from qtale.bench.llama_bench import LlamaBench, find_llama_bench, peer_folder
from qtale.bench.machine import huge_share, machine, machine_lines
from qtale.bench.samples import Paired, paired, quiet_median, undisturbed, wall
from qtale.bench.subject import Subject, Work

__all__ = [
    "LlamaBench",
    "Paired",
    "Row",
    "Subject",
    "Work",
    "batches",
    "decode",
    "find_llama_bench",
    "gguf_bytes_per_token",
    "huge_share",
    "machine",
    "machine_lines",
    "paired",
    "peer_folder",
    "prefill",
    "quiet_median",
    "table",
    "undisturbed",
    "wall",
    "write_shape",
]
