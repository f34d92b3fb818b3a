"""The figures of lsaq.py as rows of JSON and as Markdown tables in the form of the paper."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lsaq_mixes import Methods, Mix, Model
from qtale.importance import Importance
from qtale.memory.sizes import human_bytes
from qtale.planner import BudgetError, Options, Planner
from qtale.planner.source import Source

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def row(methods: Methods, mix: Mix, loss: float) -> dict[str, Any]:
    """One configuration: ``bits`` are code bits per weight of the decoder, ``bytes`` all weights in memory."""
    return {
        "method": mix.method,
        "seed": mix.seed,
        "average": mix.average,
        "group_size": mix.group_size,
        "bits": methods.mean_bits(mix.bits),
        "bytes": methods.weight_bytes(mix),
        "perplexity": math.exp(loss),
    }


def memory_rows(methods: Methods, model: Model, importance: Importance) -> list[dict[str, Any]]:
    """Figure 4: the planner's bytes of the decoder matrices and those of the buffers made for them, by average."""
    found = []
    for mix in [methods.same(16, "channel"), *(_share(methods, importance, share) for share in SHARES)]:
        planned, measured = _matrices(methods, mix), model.packed_bytes(mix)
        figures = {"planned": planned, "measured": measured, "beside": methods.weight_bytes(mix) - planned}
        found.append({"average": methods.mean_bits(mix.bits), **figures})
    return found


def _share(methods: Methods, importance: Importance, share: float) -> Mix:
    return methods.greedy(importance, "jaccard", 8 - 4 * share, "channel")


def _matrices(methods: Methods, mix: Mix) -> int:
    from qtale.memory.needed import linear_bytes
    from qtale.spec import QuantSpec

    return sum(
        linear_bytes(one, None if mix.bits[one.name] == 16 else QuantSpec(mix.bits[one.name], mix.group_size))
        for one in methods.source.shape.linears
    )


def strategy_rows(source: Source) -> list[dict[str, Any]]:
    """Table IV: what mode paper does under budgets from all at 16 bits down to less than all at 4."""
    planner = Planner(source, Options(mode="paper", reserve=0).resolved(), progress=False)
    sizes = {bits: planner.for_average(bits).needed_bytes for bits in (16, 8, 4)}
    cuts = [sizes[8] - round(share * (sizes[8] - sizes[4])) for share in (0.25, 0.5, 0.75, 1.0)]
    budgets = [sizes[16], (sizes[16] + sizes[8]) // 2, sizes[8], *cuts, sizes[4] - 1]
    return [_strategy(planner, budget) for budget in budgets]


def _strategy(planner: Planner, budget: int) -> dict[str, Any]:
    try:
        plan = planner.for_bytes(budget)
    except BudgetError as error:
        return {"budget": budget, "layers": {}, "average": None, "needed": None, "least": error.least}
    counts = Counter(layer.num_bits for layer in plan.layers)
    average = sum(layer.num_bits or 0 for layer in plan.layers) / len(plan.layers)
    return {
        "budget": budget,
        "layers": {str(bits): count for bits, count in sorted(counts.items(), reverse=True)},
        "average": average,
        "needed": plan.needed_bytes,
    }


def render(found: dict[str, Any]) -> str:
    """Every table, and what they say about the scores."""
    settings, machine = found["settings"], found["machine"]
    lines = [
        f"{settings['model']}, WikiText-2 test, first {settings['windows']} windows of {settings['window_tokens']} "
        f"tokens, {settings['dtype']}, {machine['cpu']}; calibration seeds: {settings['calibration_seeds']}"
    ]
    if found["unfinished"]:
        lines.append(f"unfinished: {found['unfinished']} mixes are left; run again to go on")
    for group in dict.fromkeys(row["group_size"] for row in found["rows"]):
        title = "one scale per channel" if group == "channel" else f"groups of {group}"
        lines += ["", f"Perplexity, {title}", "", _perplexities(found["rows"], group)]
    lines += ["", "First quarter of the layers", "", _quarter(found["first_quarter"])]
    lines += ["", "Strategy by budget, mode paper", "", _strategies(found["strategy"])]
    lines += ["", "Memory by average bits", "", _memory(found["memory"])]
    return "\n".join(lines)


def _perplexities(rows: Sequence[dict[str, Any]], group: int | str) -> str:
    own = [row for row in rows if row["group_size"] == group]
    averages = sorted({row["average"] for row in own}, reverse=True)
    lines = []
    for method in dict.fromkeys(row["method"] for row in own):
        cells = [[row for row in own if row["method"] == method and row["average"] == average] for average in averages]
        lines.append([method, *map(_cell, cells)])
    cells = [_below_random(own, average) for average in averages]
    lines.append(["random: mean - 2 sd", *cells])
    return markdown(["method", *(f"{average:g} bits" for average in averages)], lines)


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    """A perplexity, or the mean ± standard deviation over seeds."""
    values = list({row["seed"]: row["perplexity"] for row in rows}.values())
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _below_random(rows: Sequence[dict[str, Any]], average: float) -> str:
    own = [row for row in rows if row["method"] == "random" and row["average"] == average]
    values = list({row["seed"]: row["perplexity"] for row in own}.values())
    return f"{statistics.fmean(values) - 2 * statistics.stdev(values):.2f}" if len(values) > 1 else ""


def _quarter(found: dict[str, list[int]]) -> str:
    return markdown(["score", "layers"], [[metric, ", ".join(map(str, layers))] for metric, layers in found.items()])


def _strategies(rows: Iterable[dict[str, Any]]) -> str:
    lines = []
    for one in rows:
        layers = " + ".join(
            f"{count} x {'FP' if bits == '16' else 'INT'}{bits}" for bits, count in one["layers"].items()
        )
        bits = "" if one["average"] is None else f"{one['average']:.2f}"
        taken = f"waits for {human_bytes(one['least'])}" if one["needed"] is None else human_bytes(one["needed"])
        lines.append([human_bytes(one["budget"]), layers, bits, taken])
    return markdown(["budget", "layers", "average bits", "takes"], lines)


def _memory(rows: Iterable[dict[str, Any]]) -> str:
    lines = [
        [f"{one['average']:.2f}", *(f"{one[key] / 1e6:.1f}" for key in ("planned", "measured", "beside"))]
        for one in rows
    ]
    return markdown(["average bits", "decoder matrices, planned (MB)", "measured (MB)", "all else (MB)"], lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)])
