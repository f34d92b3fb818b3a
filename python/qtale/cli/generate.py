"""``qtale generate MODEL "prompt"``: continue a prompt; the text streams to stdout as it comes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtale.cli.routing import add_routing_arguments, overrides_of
from qtale.errors import InputError
from qtale.spec import ENGINE_COMPUTE

if TYPE_CHECKING:
    from qtale.engine import Engine

NAME = "generate"
HELP = "continue a prompt, in C++"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, dense or quantized, a hub name, or 'demo'")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; '-' reads it from stdin")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    parser.add_argument("--json", action="store_true", help="print a JSON object at the end instead of the text")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of loading, shared with ``qtale chat``."""
    group = add_weight_arguments(parser)
    group.add_argument("--context", type=int, metavar="N", help="most tokens of a sequence; default as the model's")
    group.add_argument("--threads", type=int, metavar="N", help="threads of the engine; default as many as cores")


def add_weight_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Those of them that ``qtale bench`` takes too, which sets the others by itself."""
    group = parser.add_argument_group("model")
    group.add_argument("--bits", type=int, metavar="N", help="round a dense model to 2, 3, 4 or 8 bits on the way in")
    group.add_argument("--group-size", "--group_size", default="auto", metavar="N", help="of --bits; default auto")
    group.add_argument("--lm-head-bits", "--lm_head_bits", type=int, metavar="N", help="round the head to 8 or 4 bits")
    group.add_argument(
        "--compute", choices=ENGINE_COMPUTE, default="int8", help="how layers multiply (bfloat16: dense ones)"
    )
    group.add_argument("--cache", metavar="auto|DIR", help="keep packed weights on disk, so that loading is fast")
    add_routing_arguments(group)
    return group


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of choosing tokens, shared with ``qtale chat``."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", "--max_new_tokens", type=int, metavar="N", help="default 256")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    group.add_argument("--top-k", "--top_k", type=int, default=0, metavar="K", help="0 is off")
    group.add_argument("--top-p", "--top_p", type=float, default=1.0, metavar="P", help="1 is off")
    group.add_argument("--min-p", "--min_p", type=float, default=0.0, metavar="P", help="0 is off")
    group.add_argument("--repetition-penalty", "--repetition_penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options ask for."""
    import qtale
    from qtale.engine.overrides import apply_overrides, check_overrides
    from qtale.integrations.scoring_model import model_folder

    overrides, folder = overrides_of(args), model_folder(args.model)
    check_overrides(overrides, folder)
    engine = qtale.load(
        folder,
        compute=args.compute,
        bits=args.bits,
        group_size=args.group_size,
        lm_head_bits=args.lm_head_bits,
        num_threads=args.threads,
        context=args.context,
        kv_dtype=args.kv_dtype or "auto",
        kv_rule=args.kv_rule,
        cache=args.cache,
        progress=sys.stderr.isatty(),
    )
    apply_overrides(overrides, engine)
    return engine


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """How tokens are chosen, as keywords of generating; InputError for values that are not accepted."""
    from qtale.engine import Sampling

    return asdict(Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty))


def run(args: argparse.Namespace) -> int:
    """Generate; returns 0."""
    sampling = sampling_of(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InputError("generate: the prompt is empty; give a text.")
    with load_engine(args) as engine, engine.session() as session:
        engine.tokenizer  # noqa: B018 — a model without one is told before anything runs
        start = time.perf_counter()
        first = None
        for piece in session.stream(prompt, args.max_new_tokens, stop=args.stop, seed=args.seed, **sampling):
            first = first or time.perf_counter()
            if not args.json:
                print(piece, end="", flush=True)
        seconds = {"prompt": (first or start) - start, "answer": time.perf_counter() - (first or start)}
        result = session.last
    if not args.json:
        print()
    elif result is not None:
        print(json.dumps({"prompt": prompt, **answer_json(result, seconds)}, ensure_ascii=False))
    return 0


def answer_json(result: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """The JSON fields of a generation."""
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.tokens),
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
    }
