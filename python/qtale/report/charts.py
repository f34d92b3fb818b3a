"""Charts of importance, plans and results: matplotlib figures that belong to no window (arXiv 2412.18135, Fig. 3, 4).

Matplotlib is imported when a chart is drawn; it comes with ``pip install qtale[viz]``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtale import names
from qtale.errors import InputError, UnsupportedError
from qtale.importance.file import Importance
from qtale.planner.plan import LayerBits, Plan
from qtale.report.quantization import Matrix, Quantization
from qtale.report.results import Point, Results

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_BLUE, _GREY, _INK = "#2563a8", "#9aa3ad", "#1f2933"
_BITS_COLOURS = {2: "#f6d9a8", 3: "#f0a860", 4: "#8fbfe0", 8: "#2f75b5", 16: "#173f6b"}
_SCORE_COLOURS = {
    **{"fisher": "#c2410c", "noise": "#a16207", "jaccard": "#2563a8", "lim": "#0f766e", "bi": "#7c3aed"},
    **{"zd": "#be185d", "error": "#4d7c0f", "kl": "#111827", "none": "#64748b", "mix": "#6b7280"},
}
_DPI = 130


def importance_bars(importance: Importance, metrics: Sequence[str] = ()) -> Figure:
    """A row of bars by layer for every score (default all); whiskers are standard errors over sequences."""
    shown = list(metrics or importance.scores)
    rows = -(-len(shown) // 2) if len(shown) > 1 else 1
    figure = _figure(11 if len(shown) > 1 else 7, 2.1 * rows + 0.3)
    for place, metric in enumerate(shown):
        axes = figure.add_subplot(rows, min(2, len(shown)), place + 1)
        order = importance.ranking(metric)
        scores = list(importance.scores[metric])
        whiskers = importance.spread(metric) if len(importance.per_sequence.get(metric, ())) > 1 else None
        top = set(order[: max(1, round(len(order) / 4))])
        colours = [_BLUE if layer in top else "#bcd3ea" for layer in range(len(scores))]
        base = _base(scores)
        heights = [score - base for score in scores]
        axes.bar(
            range(len(scores)),
            heights,
            bottom=base,
            color=colours,
            yerr=whiskers,
            ecolor=_INK,
            error_kw={"linewidth": 0.7},
        )
        axes.set_ylim(bottom=base)
        axes.set_title(metric, loc="left", fontsize=10)
        _label_layers(axes, len(scores))
    figure.supxlabel("layer; the most important quarter is dark", fontsize=9)
    return figure


def plan_chart(plan: Plan) -> Figure:
    """Bits of every module by layer, modules that share a matrix in one row, above the mean of each layer."""
    rows = _module_rows(plan)
    figure = _figure(11, 2.6 + 0.3 * len(rows))
    grid, means = figure.subplots(2, 1, sharex=True, height_ratios=[max(1.0, 0.45 * len(rows)), 1.8])
    for row, modules in enumerate(rows.values()):
        for layer, bits in enumerate(modules):
            grid.add_patch(_square(layer, row, _BITS_COLOURS[bits]))
            grid.text(layer, row, str(bits), ha="center", va="center", fontsize=7, color=_text_on(bits))
    grid.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=list(rows))
    grid.tick_params(length=0)
    means.bar(range(len(plan.layers)), [_mean(entry) for entry in plan.layers], color=_BLUE)
    means.set_ylabel("mean bits\nof modules", fontsize=9)
    means.set_xlabel("layer", fontsize=9)
    _label_layers(means, len(plan.layers))
    return figure


def frontier(results: Results) -> Figure:
    """Perplexity by size of the weights, a panel for each grouping: knapsack solid, greedy dashed, random as a band."""
    sizes = results.group_sizes
    figure = _figure(11, 4.4 * len(sizes))
    for place, group in enumerate(sizes):
        axes = figure.add_subplot(len(sizes), 1, place + 1)
        points = results.points(group)
        for method in dict.fromkeys(point.method for point in points):
            _draw_method(axes, method, sorted((p for p in points if p.method == method), key=lambda point: point.bytes))
        title = "one scale per channel" if group == "channel" else f"groups of {group}"
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=8)
        axes.set_xlabel("weights in memory, MB", fontsize=9)
        axes.set_ylabel("perplexity", fontsize=9)
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def error_chart(quantization: Quantization) -> Figure:
    """A panel for each module: the error of its outputs by layer beside that of rounding to nearest, and the time.

    Without calibration there is one line, the error of the weights, and no panel of times.
    """
    modules = quantization.by_module()
    seconds = quantization.seconds_by_layer()
    panels = len(modules) + any(seconds)
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = _figure(11 if columns > 1 else 7, 2.1 * rows + 0.5)
    for place, (module, matrices) in enumerate(modules.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_errors(axes, module, matrices)
        _label_layers(axes, quantization.num_layers)
    if any(seconds):
        axes = figure.add_subplot(rows, columns, panels)
        axes.bar(range(len(seconds)), seconds, color=_BLUE)
        axes.set_title("seconds", loc="left", fontsize=10)
        _label_layers(axes, quantization.num_layers)
    kind = "outputs" if quantization.calibrated else "weights"
    figure.supxlabel(f"layer; relative error of the {kind}, logarithmic", fontsize=9)
    return figure


def overlap_map(importance: Importance) -> Figure:
    """|A ∩ B| / |A ∪ B| of the token sets of every two layer boundaries, mean over the sequences."""
    overlap = mean_overlap(importance.token_sets)
    figure = _figure(6.4, 5.4)
    axes = figure.add_subplot()
    shown = axes.imshow(overlap, cmap="Blues", vmin=0, vmax=1, origin="lower")
    axes.set_xlabel("after layer (-1: embedding)", fontsize=9)
    axes.set_ylabel("after layer", fontsize=9)
    ticks = range(0, len(overlap), max(1, len(overlap) // 8))
    labels = [str(tick - 1) for tick in ticks]
    axes.set(xticks=list(ticks), yticks=list(ticks), xticklabels=labels, yticklabels=labels)
    axes.tick_params(labelsize=8)
    figure.colorbar(shown, ax=axes, label="overlap of token sets")
    return figure


def mean_overlap(token_sets: Sequence[Sequence[Sequence[int]]]) -> npt.NDArray[np.float64]:
    """Float64 [boundaries, boundaries] from sets by sequence and boundary; InputError where there are none."""
    import numpy as np

    if not token_sets:
        raise InputError("report: the importance has no token sets; measure with the metric jaccard.")
    total = np.zeros((len(token_sets[0]),) * 2)
    for sequence in token_sets:
        sets = [set(tokens) for tokens in sequence]
        total += [[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets]
    return total / len(token_sets)


def _draw_errors(axes: Any, module: str, matrices: Sequence[Matrix]) -> None:
    layers = [matrix.layer for matrix in matrices]
    nearest = [matrix.nearest for matrix in matrices if matrix.nearest is not None]
    if len(nearest) == len(matrices):
        axes.plot(layers, nearest, "-o", color=_GREY, linewidth=1, markersize=3, label="to nearest")
    axes.plot(layers, [matrix.error for matrix in matrices], "-o", color=_BLUE, markersize=3, label="as written")
    axes.set_title(module, loc="left", fontsize=10)
    # An error of 0, as where a layer gives nothing, has no place on a logarithmic axis.
    axes.set_yscale("log", nonpositive="mask")
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, axis="y")
    if nearest:
        axes.legend(fontsize=8, frameon=False)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"report: charts need matplotlib, which cannot be imported ({error}); run `pip install qtale[viz]`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _square(layer: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.48, row - 0.46), 0.96, 0.92, color=colour, linewidth=0)


def _text_on(bits: int) -> str:
    return "white" if bits >= 8 else _INK


def _label_layers(axes: Any, count: int) -> None:
    axes.set_xticks(range(0, count, max(1, count // 15)))
    axes.set_xlim(-0.7, count - 0.3)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _base(scores: Sequence[float]) -> float:
    """Where bars begin: at 0, or below the least score where scores are negative or differ by little."""
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 2 * (high - low):
        return 0.0
    return low - 0.08 * (high - low) if high > low else low - 1.0


def _mean(entry: LayerBits) -> float:
    bits = [entry.num_bits] if entry.num_bits is not None else list((entry.modules or {}).values())
    return sum(bits) / len(bits)


def _module_rows(plan: Plan) -> dict[str, list[int]]:
    """Label → bits by layer; modules that every layer gives the same bits together are one row."""
    listed = next((entry.modules for entry in plan.layers if entry.modules is not None), None)
    if listed is None:
        return {"all": [entry.num_bits or 0 for entry in plan.layers]}
    groups: dict[str, list[str]] = {}
    for module in listed:
        groups.setdefault(names.shared_spec_key(module) or module, []).append(module)
    found = {}
    for members in groups.values():
        label = ", ".join(module.rpartition(".")[2].removesuffix("_proj") for module in members)
        found[label] = [entry.bits_of(members[0]) for entry in plan.layers]
    return found


def _draw_method(axes: Any, method: str, points: Sequence[Point]) -> None:
    kind, _, score = method.partition(" ")
    sizes = [point.bytes / 1e6 for point in points]
    values = [point.perplexity for point in points]
    if method == "dense":
        axes.axhline(values[0], color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), label="as stored")
        return
    if method == "random":
        low, high = ([value + sign * 2 * p.spread for value, p in zip(values, points, strict=True)] for sign in (-1, 1))
        axes.fill_between(sizes, low, high, color=_GREY, alpha=0.3, linewidth=0, label="random ± 2 sd")
        axes.plot(sizes, values, color=_GREY, linewidth=1)
        return
    style = {"knapsack": "-o", "greedy": "--s", "uniform": ":^"}.get(kind, "D")
    colour = _SCORE_COLOURS.get(score, _INK)
    width = 2 if kind == "knapsack" else 1.1
    axes.plot(sizes, values, style, color=colour, linewidth=width, markersize=4, label=method)
