"""``qtale bench MODEL``: how fast the engine runs a model here, beside what the machine can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from qtale.cli.generate import add_weight_arguments
from qtale.cli.routing import overrides_of
from qtale.errors import InputError

NAME = "bench"
HELP = "measure prefill and decode beside the machine's limits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, dense or quantized, a hub name, or 'demo'")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_weight_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--threads", metavar="N[,N…]", help="thread counts; default 1 and as many as there are cores")
    group.add_argument("--batch", default="1,2,4,8,16", metavar="N[,N…]", help="sequences that are decoded together")
    group.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt; default 512")
    group.add_argument("--repeat", type=int, default=9, metavar="N", help="samples; a third of it for slow figures")
    group.add_argument("--peer", metavar="NAME", help="measure beside llama.cpp, with random weights of the same shape")
    group.add_argument("--peer-path", "--peer_path", type=Path, metavar="PATH", help="its llama-bench program")


def counts(text: str, option: str) -> tuple[int, ...]:
    """'1,2,4' as numbers; InputError for anything else."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise InputError(f"bench: {option} {text!r} must be counts with commas between, such as 1,2.") from error


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0."""
    from qtale.bench.run import BenchOptions, bench
    from qtale.engine.layout import WeightOptions
    from qtale.engine.model import LoadOptions
    from qtale.integrations.scoring_model import model_folder
    from qtale.spec import QuantSpec

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = int(args.group_size) if args.group_size.isdecimal() else args.group_size
    overrides = overrides_of(args)
    options = BenchOptions(
        counts(args.threads or f"1,{cores}", "--threads"),
        counts(args.batch, "--batch"),
        args.prompt,
        args.repeat,
        args.peer or ("llama.cpp" if args.peer_path else None),
        args.peer_path,
        WeightOptions(None if args.bits is None else QuantSpec(args.bits, size), args.lm_head_bits),
        LoadOptions(compute=args.compute, kv_dtype=args.kv_dtype or "auto", kv_rule=args.kv_rule),
        args.cache,
        overrides,
    )
    result = bench(model_folder(args.model), options, sys.stderr.isatty())
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0


def _text(result: dict[str, Any]) -> str:
    from qtale.bench import machine_lines, table

    lines = [result["model"], *machine_lines(result["machine"])]
    lines.append(f"a token reads {result['weights']['token_bytes'] / 1e6:.1f} MB of weights")
    for limit in result["limits"]:
        named = (("int8 dot peak", limit["int8_dot"]), ("peak of tiles", limit["int8_tile"]))
        dot = "".join(f", {name} {peak / 1e9:.0f} Gop/s" for name, peak in named if peak is not None)
        lines.append(
            f"limits, {limit['threads']} thread(s): read {limit['dram_read'] / 1e9:.1f} GB/s ({limit['reader']}){dot}"
        )
    return "\n".join([*lines, "", table(result["results"])])
