"""The harness's table on stdout, with a second column where there is a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qtale.eval.catalog import WIKITEXT
from qtale.report.text import human_bytes

if TYPE_CHECKING:
    from qtale.eval.run import EvalOutcome

_BETTER = {True: "↑", False: "↓"}


def render(outcome: EvalOutcome) -> str:
    """The header line, the table or tables, and what the model costs."""
    from lm_eval.utils import make_table

    results, baseline = outcome.results, outcome.baseline
    lines = [_header(results)]
    if baseline is None:
        lines += [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    else:
        lines.append(_comparison(results, baseline))
    lines += _perplexities(results, baseline)
    lines.append(_costs("scored", results["qtale"]))
    lines += [_costs("baseline", baseline["qtale"])] if baseline is not None else []
    lines += [f"written: {outcome.file}"] if outcome.file is not None else []
    return "\n".join(lines)


def _header(results: dict[str, Any]) -> str:
    config = results["config"]
    arguments = ",".join(f"{key}={value}" for key, value in config["model_args"].items())
    shots = sorted({str(count) for count in results["n-shot"].values()})
    return (
        f"qtale ({arguments}), gen_kwargs: ({config['gen_kwargs']}), limit: {config['limit']}, "
        f"num_fewshot: {','.join(shots)}, batch_size: {config['batch_size']}"
    )


def _comparison(results: dict[str, Any], baseline: dict[str, Any]) -> str:
    from pytablewriter import MarkdownTableWriter
    from pytablewriter.typehint import String

    writer = MarkdownTableWriter(
        headers=["Tasks", "n-shot", "Metric", "", "Value", "", "Stderr", "Dense", "Difference"],
        value_matrix=list(_rows(results, baseline)),
        type_hints=[String] * 9,
    )
    return str(writer.dumps())


def _rows(results: dict[str, Any], baseline: dict[str, Any]) -> Iterator[list[str]]:
    for task, values in results["results"].items():
        for key in sorted(values):
            metric, _, filter_name = key.partition(",")
            value = values[key]
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            dense = baseline["results"][task][key]
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            better = _BETTER.get(results.get("higher_is_better", {}).get(task, {}).get(metric), "")
            spread = ["±", f"{stderr:.4f}"] if isinstance(stderr, float) else ["", ""]
            shots = str(results["n-shot"].get(task, ""))
            name = values.get("alias", task)
            yield [name, shots, metric, better, f"{value:.4f}", *spread, f"{dense:.4f}", f"{value - dense:+.4f}"]


def _perplexities(results: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    found = results["qtale"].get(WIKITEXT)
    if found is None:
        return []
    dense = "" if baseline is None else f", dense {baseline['qtale'][WIKITEXT]['perplexity']:.3f}"
    return [
        f"WikiText-2 perplexity, {found['windows']} of {found['windows_in_text']} windows of {found['window_tokens']} "
        f"tokens: {found['perplexity']:.3f}{dense}"
    ]


def _costs(label: str, facts: dict[str, Any]) -> str:
    text = f"{label}: {human_bytes(facts['bytes'])} of weights, {facts['bits_per_weight']:.2f} bits per weight"
    if facts["bits_per_weight_quantized"] is not None:
        text += f" ({facts['bits_per_weight_quantized']:.2f} in the quantized layers)"
    text += f", peak memory {human_bytes(facts['peak_memory_bytes'])}"
    if facts["tokens_per_second"] is not None:
        text += f", {facts['requests_per_second']:.1f} requests/s, {facts['tokens_per_second']:.0f} tokens/s"
    return text
