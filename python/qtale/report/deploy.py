"""A deployment's report as text."""

from __future__ import annotations

from qtale import names
from qtale.deployment.change import DeployReport, ModuleChange
from qtale.memory.runtime import ENGINE, TORCH
from qtale.memory.sizes import human_bytes
from qtale.report.text import ranges

_RUNNERS = {ENGINE: "the engine", TORCH: "PyTorch"}


def render(report: DeployReport) -> str:
    """What takes how much now, which layers changed from which bits to which, and what the process holds."""
    model = report.plan.model
    stored, reserve = human_bytes(report.stored_bytes), human_bytes(report.reserve_bytes)
    lines = [
        f"{model.model_type}, {model.num_layers} layers, of {report.model}, run by {_RUNNERS[report.backend]}",
        f"weights {human_bytes(report.weights_bytes)} (as stored {stored}), {reserve} for KV cache and workspace",
    ]
    if report.budget_bytes is not None:
        lines.append(f"budget {human_bytes(report.budget_bytes)} ({report.budget_source})")
    lines += _steps(report.changes)
    if report.resident_before is not None and report.resident_after is not None:
        lines.append(f"process {human_bytes(report.resident_before)} → {human_bytes(report.resident_after)}")
    return "\n".join([*lines, f"{report.seconds:.1f} s"])


def _steps(changes: tuple[ModuleChange, ...]) -> list[str]:
    """``16 → 8 bits: 84 modules of layers 0-11`` for every pair of bits; the head stands beside the layers."""
    groups: dict[tuple[int, int], list[str]] = {}
    for change in changes:
        groups.setdefault((change.bits_before, change.bits_after), []).append(change.name)
    return [
        f"{old} → {new} bits: {len(modules)} {'module' if len(modules) == 1 else 'modules'} of {_places(modules)}"
        for (old, new), modules in sorted(groups.items(), reverse=True)
    ] or ["no layer changed"]


def _places(modules: list[str]) -> str:
    blocks = sorted({place[0] for place in map(names.split_block, modules) if place is not None})
    parts = [f"{'layer' if len(blocks) == 1 else 'layers'} {ranges(blocks)}"] if blocks else []
    return " and ".join([*parts, *(name for name in modules if names.split_block(name) is None)])
