"""``qtale import-gguf FILE -o DIR``: a GGUF file of the Llama family as an ordinary HuggingFace folder."""

from __future__ import annotations

import argparse
import json

NAME = "import-gguf"
HELP = "turn a GGUF file of the Llama family into a HuggingFace folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .gguf file (architecture llama, qwen2 or qwen3)")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="the folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of the weights (float16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Import, or describe with ``--dry-run``; returns 0, errors are raised."""
    from pathlib import Path

    from qtale.checkpoint.output import check_output
    from qtale.integrations.gguf import describe, import_gguf

    report = describe(args.file, dtype=args.dtype)
    check_output(Path(args.out).expanduser())
    if not args.dry_run:
        import_gguf(args.file, args.out, dtype=args.dtype)
    if args.json:
        print(json.dumps({**report.to_json(), "out": args.out, "dry_run": args.dry_run}, ensure_ascii=False))
        return 0
    types = ", ".join(f"{count} {name}" for name, count in report.tensor_types.items())
    print(f"{report.name}: {report.architecture}, {report.layers} layers, hidden size {report.hidden_size}, ", end="")
    print(f"vocabulary {report.vocabulary}, {report.parameters / 1e6:.1f} million parameters")
    print(f"tensors as stored: {types}; {report.bytes_in / 1e6:.1f} MB")
    verb = "would write" if args.dry_run else "wrote"
    print(f"{verb} {report.dtype} weights of {report.bytes_out / 1e6:.1f} MB to {args.out}")
    return 0
