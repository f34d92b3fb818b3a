"""The text of a quantization's report, done or planned."""

from __future__ import annotations

from qtale.ptq.worklist import LayerRow, QuantizeReport
from qtale.report.text import Row, describe_groups, fold, human_bytes, table


def render(report: QuantizeReport, every_layer: bool = False) -> str:
    """A table of the layers (equal ones folded unless ``every_layer``) with sizes before and after, and the totals."""
    rows = [_text_row(row) for row in report.layers]
    lines = [
        (row.name, str(row.count), *row.cells, human_bytes(row.sizes[0]), human_bytes(row.sizes[1]))
        for row in (rows if every_layer else fold(rows))
    ]
    header = ("layer", "count", "shape", "bits", "group", "zero", "before", "after")
    totals = (
        f"{len(report.layers)} layers: {human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}, "
        f"{report.bits_per_weight:.2f} bits per weight ({report.bits_per_weight_quantized:.2f} in the quantized layers)"
    )
    return "\n".join([table(header, lines), "", totals, _last_line(report)])


def _last_line(report: QuantizeReport) -> str:
    if report.dry_run:
        seconds = report.estimated_seconds
        time = "" if seconds is None else f" and {max(seconds / 60, 0.1):.1f} minutes here"
        return f"dry run: nothing was written; quantizing needs about {human_bytes(report.peak_bytes)} of memory{time}"
    return f"{_errors(report)}wrote {report.out}"


def _errors(report: QuantizeReport) -> str:
    """A line on what a calibrated method gained over rounding, as means over the matrices."""
    found = [(row.output_error, row.rtn_output_error) for row in report.layers]
    pairs = [(now, rounded) for now, rounded in found if now is not None and rounded is not None]
    if not pairs:
        return ""
    now, rounded = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return f"error of outputs on the calibration data: {rounded:.2e} by rounding, {now:.2e} now\n"


def _text_row(row: LayerRow) -> Row:
    shape = f"{row.shape[0]} x {row.shape[1]}"
    zero = "" if row.symmetric else "yes"
    cells = (shape, str(row.num_bits), describe_groups(row.group_size), zero)
    return Row(row.name, cells, (row.bytes_before, row.bytes_after))
