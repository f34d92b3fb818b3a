"""A plan as text: one bar for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qtale import names
from qtale.memory.sizes import human_bytes
from qtale.planner.plan import LayerBits, Plan

_CELLS_PER_BIT = 2
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(plan: Plan) -> str:
    """The plan's facts, a bar of bits for each layer, and how many layers have which bits.

    The bar of a layer whose modules differ shows the mean over its modules, which are listed behind it.
    """
    width = len(str(len(plan.layers) - 1))
    lines = [_headline(plan), _budget(plan), ""]
    lines += [f"{entry.layer:>{width}}  {_bar(_mean(entry)):<32}  {_detail(entry)}" for entry in plan.layers]
    lines += ["", f"head {plan.lm_head_bits} bits; {_counts(plan)}"]
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    groups = {"channel": "one scale per channel", "auto": "automatic groups"}.get(
        str(plan.group_size), f"groups of {plan.group_size}"
    )
    symmetry = "symmetric" if plan.symmetric else "asymmetric"
    scores = "no scores" if plan.metric == "none" else f"scores by {plan.metric}"
    return (
        f"{plan.model.model_type}, {plan.model.num_layers} layers, fingerprint {plan.model.fingerprint[:19]}: "
        f"mode {plan.mode}, {scores}, {groups}, {symmetry}"
    )


def _budget(plan: Plan) -> str:
    needed = f"needs {human_bytes(plan.needed_bytes)} ({plan.needed_bytes} B)"
    if plan.context is not None and plan.batch is not None:
        needed += f" with {plan.batch} x {plan.context} tokens of context"
    if plan.budget_bytes is None:
        return needed
    return f"{needed} of a budget of {human_bytes(plan.budget_bytes)} ({plan.budget_bytes} B)"


def _mean(entry: LayerBits) -> float:
    if entry.num_bits is not None:
        return entry.num_bits
    bits = list((entry.modules or {}).values())
    return sum(bits) / len(bits)


def _bar(bits: float) -> str:
    eighths = round(8 * _CELLS_PER_BIT * bits)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _detail(entry: LayerBits) -> str:
    if entry.num_bits is not None:
        return str(entry.num_bits)
    return f"{_mean(entry):.1f}: {', '.join(_modules(entry.modules or {}))}"


def _modules(modules: Mapping[str, int]) -> list[str]:
    """``q,k,v 4`` and the like: modules that share a matrix together."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, bits in modules.items():
        short = name.rpartition(".")[2].removesuffix("_proj")
        groups.setdefault((names.shared_spec_key(name) or name, bits), []).append(short)
    return [f"{','.join(members)} {bits}" for (_, bits), members in groups.items()]


def _counts(plan: Plan) -> str:
    counts = Counter(f"{entry.num_bits} bits" if entry.num_bits else "mixed" for entry in plan.layers)
    return ", ".join(f"{count} {'layer' if count == 1 else 'layers'} {what}" for what, count in sorted(counts.items()))
