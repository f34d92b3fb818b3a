"""``qtale eval``: score a model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qtale.cli.routing import add_routing_arguments, overrides_of
from qtale.errors import InputError
from qtale.eval.options import BACKENDS, DEMO, SEEDS, EvalOptions
from qtale.ptq.options import AUTO, METHODS, RTN
from qtale.spec import ENGINE_COMPUTE, QuantSpec

NAME = "eval"
HELP = "score a model on tasks of lm-evaluation-harness"
_DEMO_BITS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb; those that lm-eval has are spelled as lm-eval spells them."""
    _add_model_arguments(parser)
    _add_task_arguments(parser)
    parser.add_argument("--output_path", "-o", type=Path, metavar="DIR|FILE.json", help="write lm-eval's result files")
    parser.add_argument("--log_samples", "-s", action="store_true", help="write every document and answer too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        "-m",
        metavar="PATH|NAME|demo",
        help="folder or hub name (default: the demo model at 4 bits)",
    )
    add("--bits", type=int, metavar="N", help="quantize in memory: 2, 3, 4 or 8")
    add("--group-size", "--group_size", metavar="auto|N|channel", help="weights per scale: 32, 64, 128 (default auto)")
    add("--symmetric", dest="symmetric", action="store_true", default=None, help="with --bits; the default")
    add("--asymmetric", dest="symmetric", action="store_false", help="with --bits; zero points")
    add("--method", choices=METHODS, help="with --bits: how codes are found (default rtn, in memory; demo: auto)")
    add("--dense", action="store_true", help="score the model as it is stored")
    add(
        "--baseline",
        nargs="?",
        const="",
        metavar="PATH|NAME",
        help="score the dense model too and print both (PATH: the dense original of a quantized folder)",
    )
    add(
        "--compute",
        choices=ENGINE_COMPUTE,
        default=EvalOptions.compute,
        help="how layers multiply: quantized ones with activations of 8 bits (as generation does), of 16 (default) or "
        "as they are, dense ones in bfloat16",
    )
    add(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="default", help="default: float32 on CPU"
    )
    add("--backend", choices=BACKENDS, default="auto", help="C++ engine, torch, or the engine where it can (auto)")
    add("--lm-head-bits", type=int, choices=(4, 8), help="quantize the head too (engine)")
    add("--threads", type=int, metavar="N", help="of the engine (default: all)")
    add_routing_arguments(group, "float32, as torch keeps them")
    add("--device", default="cpu", help="torch device (default cpu)")
    add("--batch_size", "-b", default="auto", metavar="N|auto", help="sequences a pass (default auto)")
    add("--max_length", type=int, metavar="N", help="longest input in tokens (default: the model's)")
    add("--trust_remote_code", action="store_true", help="let the model's own Python code run")


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--tasks",
        "-t",
        required=True,
        metavar="A,B",
        help="lm-eval's names, or arc_e, arc_c, obqa, hs, wg, siqa, boolq, piqa, wikitext, mmlu",
    )
    add("--data", default="auto", metavar="auto|hub|bundled|DIR", help="where documents come from (default auto)")
    add("--num_fewshot", "-f", type=int, metavar="N", help="examples in each prompt (default: the task's)")
    add("--limit", "-L", type=float, metavar="N", help="documents a task; below 1 a share of them")
    add("--include_path", metavar="DIR", help="folder of further task files")
    add("--gen_kwargs", metavar="A=B,...", help="for tasks that generate")
    add("--system_instruction", metavar="TEXT")
    add("--apply_chat_template", nargs="?", const=True, default=False, metavar="NAME")
    add("--fewshot_as_multiturn", type=_boolean, nargs="?", const=True, default=True, metavar="BOOL")
    add("--use_cache", "-c", metavar="FILE", help="keep and reuse answers")
    add("--seed", type=_seeds, default=SEEDS, metavar="N|A,B,C,D", help="python, numpy, torch, few-shot")
    add("--perplexity_windows", type=int, metavar="N", help="wikitext: windows of 2048 tokens (default all)")


def run(args: argparse.Namespace) -> int:
    """Score and print; returns 0."""
    options = options_of(args)
    from qtale.eval.run import evaluate
    from qtale.eval.tables import render

    outcome = evaluate(options)
    if args.json:
        from lm_eval.utils import handle_non_serializable

        json.dump(outcome.results, sys.stdout, default=handle_non_serializable, ensure_ascii=False)
        print()
    else:
        print(render(outcome))
    return 0


def options_of(args: argparse.Namespace) -> EvalOptions:
    """The options that a command line asks for; InputError for combinations that mean nothing."""
    same: dict[str, Any] = {
        name: getattr(args, name) for name in EvalOptions.__dataclass_fields__ if hasattr(args, name)
    }
    if args.limit is not None and args.limit >= 1:
        same["limit"] = int(args.limit)
    same |= {
        "tasks": tuple(args.tasks.split(",")),
        "model": args.model or DEMO,
        "spec": _spec(args),
        "method": _method(args),
        "routing": overrides_of(args),
    }
    return EvalOptions(**same)


def _method(args: argparse.Namespace) -> str:
    if args.method is not None:
        return str(args.method)
    plain = args.model is None and args.bits is None and args.group_size is None and args.symmetric is None
    return AUTO if plain and not args.dense else RTN


def _spec(args: argparse.Namespace) -> QuantSpec | None:
    detailed = args.group_size is not None or args.symmetric is not None
    if args.dense:
        if args.bits is not None or detailed:
            raise InputError("--dense: scores the model as stored, so --bits, --group-size and symmetry do not apply.")
        return None
    bits = args.bits
    if bits is None and args.model is None:
        bits = _DEMO_BITS
    if bits is None:
        if detailed:
            raise InputError("--group-size, --symmetric, --asymmetric: need --bits, which says to quantize in memory.")
        return None
    size = args.group_size or "auto"
    return QuantSpec(bits, int(size) if size.isdecimal() else size, args.symmetric is not False)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _seeds(text: str) -> tuple[int | None, ...]:
    values = tuple(None if part.strip() == "None" else int(part) for part in text.split(","))
    if len(values) not in (1, 4):
        raise argparse.ArgumentTypeError("takes one seed, or four: python,numpy,torch,few-shot")
    return values * 4 if len(values) == 1 else values
