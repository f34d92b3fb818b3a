"""What quantization costs: task accuracy and perplexity of the demo model (or another) at several bit widths.

Each perplexity stands beside that of an independent round-to-nearest in plain torch, which has none of qtale's code.
The demo weights come from a 4-bit file: losses are on top of a 4-bit original.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import qtale
from qtale import QuantSpec, _core
from qtale.eval import EvalOptions, evaluate

SPECS: dict[str, QuantSpec | None] = {
    "dense": None,
    "W8 per channel": QuantSpec(8, "channel"),
    "W4 groups of 64": QuantSpec(4, 64),
    "W4 groups of 32, asymmetric": QuantSpec(4, 32, symmetric=False),
    "W4 per channel": QuantSpec(4, "channel"),
    "W3 groups of 64": QuantSpec(3, 64),
}
WINDOW = 2048


def torch_rtn(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Round to nearest with float16 scales in plain torch; weight [out, in] in float32."""
    out, columns = weight.shape
    groups = weight.reshape(out, -1, columns if spec.group_size == "channel" else int(spec.group_size))
    levels, half = 2**spec.num_bits - 1, 2 ** (spec.num_bits - 1)
    if spec.symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / (levels / 2)).half().float()
        zero = torch.zeros_like(scale)
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / levels).half().float()
        zero = (-half - low / scale).round().clamp(-half, half - 1)
    codes = ((groups / scale).round() + zero).clamp(-half, half - 1)
    return ((codes - zero) * scale).reshape(out, columns)


def torch_perplexity(folder: Path, text: str, windows: int, spec: QuantSpec | None) -> float:
    """Perplexity over the first windows by plain transformers, decoder matrices rounded by :func:`torch_rtn`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if spec is not None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = torch_rtn(module.weight.data, spec)
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    losses = []
    with torch.inference_mode():
        for at in range(0, windows * WINDOW, WINDOW):
            ids = tokens[at : at + WINDOW].unsqueeze(0)
            logits = model(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return math.exp(math.fsum(losses) / len(losses))


def score(options: argparse.Namespace, spec: QuantSpec | None, tasks: tuple[str, ...]) -> dict[str, Any]:
    """lm-eval's results of one form of the model."""
    outcome = evaluate(
        EvalOptions(
            tasks,
            model=options.model,
            spec=spec,
            data=options.data,
            limit=options.limit,
            perplexity_windows=options.windows or None,
        )
    )
    return outcome.results


def measure(name: str, spec: QuantSpec | None, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row: accuracies as ``qtale eval`` gives them, perplexities of two modes and of torch."""
    row: dict[str, Any] = {"form": name}
    results = score(options, spec, tuple(options.tasks.split(",")))
    row["bits_per_weight"] = results["qtale"]["bits_per_weight"]
    for task, values in results["results"].items():
        row[task] = {key: values[f"{key},none"] for key in ("acc", "acc_norm") if f"{key},none" in values}
    if options.windows:
        text = (Path(options.data) / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
        row["perplexity_float"] = options.perplexity(spec, "float", text)
        # A dense model multiplies in one way only.
        row["perplexity_int8"] = options.perplexity(spec, "int8", text) if spec else row["perplexity_float"]
        row["perplexity_torch"] = torch_perplexity(folder, text, options.windows, spec)
    return row


def qtale_perplexity(folder: Path, windows: int) -> Any:
    """A function (spec, compute, text) -> perplexity of the folder's model as qtale runs it."""
    from transformers import AutoTokenizer

    from qtale.eval.perplexity import perplexity
    from qtale.integrations.lm_eval import QtaleLM
    from qtale.integrations.scoring_model import load_model

    def run(spec: QuantSpec | None, compute: str, text: str) -> float:
        model = load_model(folder, spec, compute, torch.float32, "cpu")
        lm = QtaleLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder))
        return perplexity(lm, text, windows).perplexity

    return run


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    tasks = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    modes = [key for key in rows[0] if key.startswith("perplexity_")]
    head = ["form", "bits per weight", *tasks, *(f"ppl {mode.removeprefix('perplexity_')}" for mode in modes)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["form"], f"{row['bits_per_weight']:.2f}"]
        cells += [" / ".join(f"{value:.3f}" for value in row[task].values()) for task in tasks]
        cells += [f"{row[mode]:.2f}" for mode in modes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, or demo")
    parser.add_argument("--tasks", default="arc_easy,piqa")
    parser.add_argument("--data", default="bundled", help="bundled, or a folder (which --windows needs)")
    parser.add_argument("--limit", type=float, help="documents a task (default: all)")
    parser.add_argument("--windows", type=int, default=0, help="windows of 2048 tokens for perplexity (0: none)")
    parser.add_argument("--form", action="append", choices=SPECS, help="a form to measure; repeatable (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    folder = qtale.demo.model() if options.model == "demo" else Path(options.model)
    options.perplexity = qtale_perplexity(folder, options.windows)
    rows = []
    for name in options.form or SPECS:
        rows.append(measure(name, SPECS[name], options, folder))
        print(render(rows[-1:]), file=sys.stderr)
        if options.json:  # after every form: all of them take hours on a small machine
            machine = {"cpu": platform.processor(), "isa": _core.cpu_isa(), "threads": _core.num_threads()}
            Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=2), encoding="utf-8")
    print(render(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
