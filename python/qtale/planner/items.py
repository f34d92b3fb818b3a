"""From a model's shape to the items of the allocation problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qtale import names
from qtale.errors import InputError, UnsupportedError
from qtale.memory.needed import linear_bytes
from qtale.memory.shape import LinearShape, ModelShape
from qtale.planner.options import AUTO, Options
from qtale.planner.plan import HEAD, LayerBits
from qtale.planner.problem import Item

# Cost and loss of a Linear at a number of bits.
Cost = Callable[[LinearShape, int], int]
Loss = Callable[[LinearShape, int], float]


def build_items(shape: ModelShape, options: Options, cost: Cost, loss: Loss) -> list[Item]:
    """One item for each layer, or for each module with q/k/v and gate/up tied; the head last where it is to be chosen.

    Raises UnsupportedError where the decoder blocks are not numbered from 0 on.
    """
    groups: dict[str, list[LinearShape]] = {}
    for linear in shape.linears:
        groups.setdefault(_key(linear.name, options.granularity == "layer"), []).append(linear)
    blocks = {layer_of(linear.name) for linear in shape.linears}
    if blocks != set(range(shape.num_layers)):
        raise UnsupportedError(f"plan: the decoder blocks are numbered {sorted(blocks)}; a plan needs 0, 1, 2 ….")
    if shape.head is not None and options.head_bits == AUTO:
        groups[HEAD] = [shape.head]
    return [_item(group, options.choices or (), cost, loss) for group in groups.values()]


def head_bits(shape: ModelShape, options: Options, chosen: Mapping[str, int]) -> int:
    """Bits of lm_head under the options; InputError for fewer than 16 where it shares the embedding's memory."""
    if options.head_bits == AUTO:
        return chosen.get(HEAD, 16)
    if shape.head is None and options.head_bits != 16:
        raise InputError(
            f"plan: head bits {options.head_bits}, but this model's head is its embedding, so a second copy would take "
            "more memory, not less; leave it at 16."
        )
    return int(options.head_bits)


def byte_cost(options: Options) -> Cost:
    """Bytes in memory, scales included."""
    return lambda linear, bits: linear_bytes(linear, options.spec(bits))


def bit_cost(linear: LinearShape, bits: int) -> int:
    """Bits of the codes alone, without scales."""
    return linear.weights * bits


def chosen_bits(items: Sequence[Item], choices: Sequence[int]) -> dict[str, int]:
    """Module → bits."""
    pairs = zip(items, choices, strict=True)
    return {module: item.bits[choice] for item, choice in pairs for module in item.modules}


def layer_bits(shape: ModelShape, chosen: Mapping[str, int]) -> tuple[LayerBits, ...]:
    """The layers of a plan: one number where a layer's modules all have the same bits, else one for each module."""
    layers: list[dict[str, int]] = [{} for _ in range(shape.num_layers)]
    for linear in shape.linears:
        place = names.split_block(linear.name)
        if place is not None:
            layers[place[0]][place[1]] = chosen[linear.name]
    return tuple(
        LayerBits(layer, next(iter(bits.values()))) if len(set(bits.values())) == 1 else LayerBits(layer, modules=bits)
        for layer, bits in enumerate(layers)
    )


def average_bits(shape: ModelShape, chosen: Mapping[str, int]) -> float:
    """Bits of the codes per weight over the Linears of the decoder blocks."""
    return sum(bit_cost(linear, chosen[linear.name]) for linear in shape.linears) / shape.weights


def layer_of(module: str) -> int:
    """The number of the decoder block that a Linear lies in."""
    index = names.block_index(f"{module}.")
    return -1 if index is None else index


def _key(module: str, by_layer: bool) -> str:
    return str(layer_of(module)) if by_layer else names.shared_spec_key(module) or module


def _item(linears: Sequence[LinearShape], choices: Sequence[int], cost: Cost, loss: Loss) -> Item:
    return Item(
        modules=tuple(linear.name for linear in linears),
        bits=tuple(choices),
        costs=tuple(sum(cost(linear, bits) for linear in linears) for bits in choices),
        losses=tuple(sum(loss(linear, bits) for linear in linears) for bits in choices),
    )
