"""One HTML page about importance, plan, quantization and results of a model: charts lie in it, nothing is loaded."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from qtale.checkpoint.output import output_folder
from qtale.errors import InputError
from qtale.files import write_whole
from qtale.importance.file import Importance, check_new
from qtale.memory.sizes import human_bytes
from qtale.planner.plan import LayerBits, Plan
from qtale.report import charts
from qtale.report.quantization import Matrix, Quantization
from qtale.report.results import Point, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = 8
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 4rem; color: #1f2933; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; } .facts { color: #52606d; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e7eb; }
th { border-bottom: 2px solid #9aa3ad; } th:first-child, td:first-child, td.text { text-align: left; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #2563a8; }
"""


def write_page(
    out: str | Path,
    importance: Importance | None = None,
    plan: Plan | None = None,
    results: Results | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Write the report as one HTML file that needs no network; it appears whole or not at all.

    It needs ``importance`` or ``quantization``. Raises InputError where both are missing, the file exists or the parts
    are of different models, UnsupportedError without matplotlib.
    """
    path = Path(out).expanduser()
    check_new(path)
    write_whole(path, page(importance, plan, results, quantization))


def write_charts(
    out: str | Path,
    importance: Importance | None = None,
    plan: Plan | None = None,
    results: Results | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Write the charts as PNG files into a new folder; it appears whole or not at all. Raises as :func:`write_page`."""
    _check_same_model(importance, plan, results, quantization)
    with output_folder(out) as folder:
        for name, (_, figure) in _figures(importance, plan, results, quantization).items():
            (folder / f"{name}.png").write_bytes(charts.png(figure))


def page(
    importance: Importance | None = None,
    plan: Plan | None = None,
    results: Results | None = None,
    quantization: Quantization | None = None,
) -> str:
    """The text of the HTML page; raises as :func:`write_page`."""
    _check_same_model(importance, plan, results, quantization)
    figures = _figures(importance, plan, results, quantization)
    images = {name: _image(figure, text) for name, (text, figure) in figures.items()}
    title = f"Layers of {Path(_model(importance, quantization)).name}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if importance is not None:
        parts += [_facts(importance), *_importance_part(importance, images)]
    if plan is not None:
        parts += _plan_part(plan, images["plan"])
    if quantization is not None:
        parts += _quantization_part(quantization, images["errors"])
    if results is not None:
        parts += _results_part(results, images["frontier"])
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _model(importance: Importance | None, quantization: Quantization | None) -> str:
    if importance is not None:
        return str(importance.model.get("path", "the model"))
    return quantization.model if quantization is not None else ""


def _check_same_model(
    importance: Importance | None, plan: Plan | None, results: Results | None, quantization: Quantization | None
) -> None:
    if importance is None and quantization is None:
        raise InputError(
            "report: no importance.json is given; make one with `qtale measure`, or give the output of "
            "`qtale quantize --json`."
        )
    prints = [
        part for part in (importance and importance.model["fingerprint"], plan and plan.model.fingerprint) if part
    ]
    if len(set(prints)) > 1:
        raise InputError(
            f"report: the plan is for another model (fingerprint {prints[1][:19]}) than the importance "
            f"({prints[0][:19]}); give files of one model."
        )
    if results is not None and prints:
        results.check_model(prints[0])
    if importance is not None and quantization is not None:
        count = importance.model["num_layers"]
        if quantization.num_layers > count:
            raise InputError(
                f"report: the quantization is of another model with at least {quantization.num_layers} layers than the "
                f"importance, which has {count}; give files of one model."
            )


def _figures(
    importance: Importance | None, plan: Plan | None, results: Results | None, quantization: Quantization | None
) -> dict[str, tuple[str, Figure]]:
    """File name → what the chart shows, and the chart."""
    found = {}
    if importance is not None:
        found["importance"] = ("Bars of importance by layer", charts.importance_bars(importance))
        if importance.token_sets:
            found["overlap"] = ("Heat map of the overlap of token sets", charts.overlap_map(importance))
    if plan is not None:
        found["plan"] = ("Bits of every module by layer", charts.plan_chart(plan))
    if quantization is not None:
        found["errors"] = ("Error of every matrix by layer", charts.error_chart(quantization))
    if results is not None:
        found["frontier"] = ("Perplexity by size of the weights", charts.frontier(results))
    return found


def _image(figure: Figure, text: str) -> str:
    data = base64.b64encode(charts.png(figure)).decode("ascii")
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _facts(importance: Importance) -> str:
    model, settings = importance.model, importance.settings
    facts = [
        f"{model.get('model_type', 'model')}, {model['num_layers']} layers, fingerprint {model['fingerprint'][:19]}",
        f"{settings.get('num_sequences', '?')} sequences of {settings.get('seq_len', '?')} tokens from "
        f"{importance.data.get('source', 'given tokens')}, seed {settings.get('seed', '?')}",
    ]
    return "".join(f'<p class="facts">{escape(fact)}</p>' for fact in facts)


def _importance_part(importance: Importance, images: dict[str, str]) -> Iterator[str]:
    yield "<h2>Importance</h2><p>Every score is turned so that a higher one means a more important layer.</p>"
    yield images["importance"]
    metrics = list(importance.scores)
    lines = [
        [str(layer), *(f"{importance.scores[metric][layer]:.4g}" for metric in metrics)]
        for layer in range(importance.model["num_layers"])
    ]
    yield _folded("Scores as numbers", _table(["layer", *metrics], lines))
    if "overlap" in images:
        yield "<h2>Token sets</h2><p>The tokens that a hidden state points to most, before and after each layer: how "
        yield "much the sets of two places share, mean over the sequences.</p>"
        yield images["overlap"]
    if importance.words and importance.token_sets:
        yield _folded("What the first sequence points to", _table(["after layer", "tokens"], _words(importance), True))


def _words(importance: Importance) -> list[list[str]]:
    return [
        [
            "embedding" if place == 0 else str(place - 1),
            " ".join(repr(importance.words.get(str(token), "?")) for token in tokens[:_WORDS]),
        ]
        for place, tokens in enumerate(importance.token_sets[0])
    ]


def _plan_part(plan: Plan, image: str) -> Iterator[str]:
    budget = "no budget in bytes" if plan.budget_bytes is None else f"a budget of {human_bytes(plan.budget_bytes)}"
    yield f"<h2>Plan</h2><p>{escape(f'Mode {plan.mode}, scores by {plan.metric}')}, {budget}; needs "
    yield f"{human_bytes(plan.needed_bytes)}. The head has {plan.lm_head_bits} bits; 16 means as stored.</p>{image}"
    lines = [[str(entry.layer), _bits(entry)] for entry in plan.layers]
    yield _folded("The plan in words", _table(["layer", "bits"], lines, True))


def _bits(entry: LayerBits) -> str:
    if entry.num_bits is not None:
        return str(entry.num_bits)
    return ", ".join(f"{module} {bits}" for module, bits in (entry.modules or {}).items())


def _quantization_part(quantization: Quantization, image: str) -> Iterator[str]:
    before, after = (human_bytes(int(quantization.totals[f"bytes_{when}"])) for when in ("before", "after"))
    yield f"<h2>Error of every matrix</h2><p>{before} → {after}, "
    yield f"{quantization.totals['bits_per_weight']:.2f} bits per weight. "
    if quantization.calibrated:
        yield "The share of the outputs' energy that is lost on the calibration data, as written and by rounding to "
        yield "nearest. "
    else:
        yield "The distance of the written weights from the given ones, as a share of their norm. "
    yield f"Solving took {sum(quantization.seconds_by_layer()):.0f} seconds.</p>{image}"
    head = ["matrix", "bits", "to nearest", "as written", "of it", "seconds"]
    lines = [_matrix(matrix) for matrix in quantization.matrices]
    yield _folded("Errors as numbers", _table(head, lines))


def _matrix(matrix: Matrix) -> list[str]:
    nearest = "" if matrix.nearest is None else f"{matrix.nearest:.3e}"
    share = f"{matrix.error / matrix.nearest:.0%}" if matrix.nearest else ""
    seconds = f"{matrix.seconds:.2f}" if matrix.seconds else ""
    name = f"{matrix.layer} {matrix.module}"
    return [name, str(matrix.num_bits), nearest, f"{matrix.error:.3e}", share, seconds]


def _results_part(results: Results, image: str) -> Iterator[str]:
    settings, machine = results.settings, results.machine
    where = f"{settings.get('windows', '?')} windows of {settings.get('window_tokens', '?')} tokens of WikiText-2"
    how = f"{settings.get('dtype', '')} on {machine.get('cpu', 'an unknown processor')}"
    yield f"<h2>Size and perplexity</h2><p>{escape(f'{where}, {how}')}. Lower is better.</p>{image}"
    for group in results.group_sizes:
        title = "one scale per channel" if group == "channel" else f"groups of {group}"
        yield _folded(f"Perplexity, {title}", _perplexities(results.points(group)))


def _perplexities(points: Sequence[Point]) -> str:
    averages = sorted({point.average for point in points}, reverse=True)
    cells = {(point.method, point.average): _cell(point) for point in points}
    lines = [
        [method, *(cells.get((method, average), "") for average in averages)]
        for method in dict.fromkeys(point.method for point in points)
    ]
    return _table(["method", *(f"{average:g} bits" for average in averages)], lines)


def _cell(point: Point) -> str:
    return f"{point.perplexity:.2f}" + (f" ± {point.spread:.2f}" if point.spread else "")


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], is_text: bool = False) -> str:
    cell = '<td class="text">' if is_text else "<td>"
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    rows = ("<tr>" + "".join(f"{cell}{escape(value)}</td>" for value in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
