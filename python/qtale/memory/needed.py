"""What a model takes in memory: weights in the layout that kernels read, KV cache and workspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtale.checkpoint.safetensors import STORED_FLOATS
from qtale.errors import InputError
from qtale.memory.runtime import TORCH, runtime
from qtale.memory.shape import LinearShape, ModelShape
from qtale.spec import QuantSpec, ResolvedSpec

SpecOf = Callable[[str], QuantSpec | None]


@dataclass(frozen=True)
class Needs:
    """Bytes by part; ``layers`` has one number for each decoder block, ``other`` is norms, biases and bookkeeping."""

    layers: tuple[int, ...]
    embedding: int
    head: int
    other: int
    kv_cache: int
    workspace: int

    @property
    def weights(self) -> int:
        """Everything that stays while the model is loaded."""
        return sum(self.layers) + self.embedding + self.head + self.other

    @property
    def total(self) -> int:
        """Weights, KV cache and workspace."""
        return self.weights + self.kv_cache + self.workspace


def linear_bytes(linear: LinearShape, spec: QuantSpec | ResolvedSpec | None) -> int:
    """Bytes of a Linear's weight: prepacked for this CPU's kernels with its scales, or as stored where spec is None.

    Scales have the dtype of the weight. Raises InputError where the group size does not divide in_features.
    """
    if spec is None:
        return linear.stored_bytes
    from qtale import _core

    resolved = spec if isinstance(spec, ResolvedSpec) else spec.resolve(linear.name, linear.in_features)
    groups = resolved.groups(linear.in_features)
    dtype = STORED_FLOATS[linear.dtype]
    return _core.prepacked_bytes(
        linear.out_features, linear.in_features, groups, resolved.num_bits, resolved.symmetric, dtype
    )


def needed(shape: ModelShape, spec_of: SpecOf, *, context: int, batch: int, backend: str = TORCH) -> Needs:
    """What a model takes that runs on ``batch`` sequences of ``context`` tokens.

    ``spec_of`` gives the spec of a Linear by its full name, None where it stays as stored (``Plan.spec_of``).
    ``backend`` is "torch" (what :func:`qtale.load_torch` makes of it) or "engine" (:func:`qtale.load`).
    Raises InputError for a negative context, a batch below 1 or another backend.
    """
    layers = [0] * shape.num_layers
    order = {number: place for place, number in enumerate(dict.fromkeys(map(_block, shape.linears)))}
    for linear in shape.linears:
        layers[order[_block(linear)]] += linear_bytes(linear, spec_of(linear.name))
    head = 0 if shape.head is None else linear_bytes(shape.head, spec_of(shape.head.name))
    return Needs(
        layers=tuple(layers),
        embedding=shape.embedding_bytes,
        head=head,
        other=runtime(backend).other(shape),
        kv_cache=kv_bytes(shape, context, batch, backend),
        workspace=workspace_bytes(shape, context, batch, backend),
    )


def kv_bytes(shape: ModelShape, context: int, batch: int, backend: str = TORCH) -> int:
    """Keys and values of ``batch`` sequences of ``context`` tokens in every layer, as wide as the model's numbers.

    That is the most: where the engine takes keys of 8 bits, which depends on the CPU and on every layer's bits, it is
    a quarter less.
    """
    if context < 0 or batch < 1:
        raise InputError(f"memory: context {context} and batch {batch}; context is 0 or more, batch 1 or more.")
    return runtime(backend).kv_cache(shape, context, batch)


def workspace_bytes(shape: ModelShape, context: int, batch: int, backend: str = TORCH) -> int:
    """The most that forward passes over ``batch * context`` tokens hold beside weights and KV cache; measured."""
    return runtime(backend).workspace(shape, context, batch)


def _block(linear: LinearShape) -> int:
    from qtale import names

    place = names.split_block(linear.name)
    return place[0] if place else 0
