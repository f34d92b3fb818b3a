"""Solvers for the codes and scales of one weight: numpy arrays or torch tensors in, the same kind out.

A weight is float32 [out, in]; codes, scales and zero points are those of :mod:`qtale.ops`. ``H`` stands for the Gram
matrix ``X^T X`` of the weight's inputs, a full symmetric float32 matrix [in, in]. Rows of a weight are solved one by
one, and no bit of a result depends on the number of threads. NaN and infinity are refused with an InputError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from qtale import _core
from qtale.errors import InputError
from qtale.kernels import group_count
from qtale.tensors import FLOATS, contiguous, empty, is_torch, memory

if TYPE_CHECKING:
    from qtale.tensors import Array

__all__ = [
    "Gptq",
    "accumulate_gram",
    "gptq",
    "project_l1",
    "prox_linf",
    "refine_codes",
    "refit_scales",
    "rounding_loss",
    "search_scales",
]


class Gptq(NamedTuple):
    """What :func:`gptq` finds; ``loss`` is ``(w - q) H (w - q)^T`` of every row, float64 [out]."""

    codes: Any
    scale: Any
    zero_point: Any
    loss: Any


def _optional(array: Array | None) -> Any:
    return None if array is None else memory(array)


def _shape(op: str, name: str, array: Array) -> tuple[int, int]:
    if array.ndim != 2:
        raise InputError(f"{op}: {name} has shape {list(array.shape)}; expected a matrix.")
    return int(array.shape[0]), int(array.shape[1])


def _grids(op: str, weight: Array, group_size: int, symmetric: bool, scale_dtype: str) -> tuple[Any, Any]:
    """Memory for scales and zero points."""
    if scale_dtype not in FLOATS:
        raise InputError(f"{op}: scale_dtype {scale_dtype!r} is not supported; use {', '.join(FLOATS)} (by name).")
    out_features, in_features = _shape(op, "weight", weight)
    params = (out_features, group_count(in_features, group_size, op))
    return empty(weight, params, scale_dtype), None if symmetric else empty(weight, params, "int8")


def _copy(array: Array) -> Any:
    return array.clone() if is_torch(array) else array.copy()


def gptq(
    weight: Array,
    factor: Array,
    num_bits: int,
    *,
    scale: Array | None = None,
    zero_point: Array | None = None,
    order: Array | None = None,
    group_size: int = 0,
    symmetric: bool = True,
    scale_dtype: str = "float32",
    importance: Array | None = None,
    steps: int = 1,
    widest: float = 1.0,
    narrowest: float = 0.5,
    signed: bool = False,
) -> Gptq:
    """GPTQ's column loop (Frantar et al., ICLR 2023, algorithm 1).

    ``factor`` [in, in] float32 is the upper triangular ``U`` with ``H^-1 = U^T U``, its rows and columns in the order
    of visits (the upper triangle is read); ``order`` int32 [in] is that order, columns as they come by default.

    With ``scale`` (and ``zero_point``) given, grids stay as they are. Otherwise there is one per group of
    ``group_size`` columns (0: per row), found when the loop reaches the group: the rule of :func:`qtale.ops.quantize`
    or, with ``steps`` above 1, the search of :func:`search_scales` weighed with ``importance`` [in], the diagonal of H.
    That needs columns in their own order, or one group.

    Raises InputError for a factor whose diagonal is not positive and for an order that is no permutation.
    """
    static = scale is not None
    if scale is None:
        scale, zero_point = _grids("gptq", weight, group_size, symmetric, scale_dtype)
    codes = empty(weight, _shape("gptq", "weight", weight), "int8")
    loss = empty(weight, (int(weight.shape[0]),), "float64")
    _core.gptq(
        memory(weight),
        memory(factor),
        _optional(order),
        num_bits,
        memory(scale),
        _optional(zero_point),
        static,
        memory(codes),
        memory(loss),
        (steps, widest, narrowest, signed),
        _optional(importance),
    )
    return Gptq(codes, scale, zero_point, loss)


def search_scales(
    weight: Array,
    importance: Array,
    num_bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    scale_dtype: str = "float32",
    *,
    steps: int = 29,
    widest: float = 1.1,
    narrowest: float = 0.4,
    signed: bool = False,
) -> tuple[Any, Any]:
    """The best of ``steps`` multiples of the range of every row and group, from ``widest`` down to ``narrowest``.

    A single step is the rule of :func:`qtale.ops.quantize`. ``signed`` tries scales below zero too: symmetric codes
    reach one step further down than up, and the sign of the scale chooses which side that is.

    ``importance`` float32 is [in], which weighs squared errors (the diagonal of H; all ones for the plain error), or
    [groups, group_size, group_size], diagonal blocks of H, for the error ``(w - q)^T H_g (w - q)``. Scales are rounded
    to ``scale_dtype`` before errors are taken; of equal ones the first stays.

    Returns (scale [out, groups], zero_point int8 [out, groups] or None).
    """
    scale, zero_point = _grids("search_scales", weight, group_size, symmetric, scale_dtype)
    _core.search_scales(
        memory(weight),
        memory(importance),
        num_bits,
        memory(scale),
        _optional(zero_point),
        (steps, widest, narrowest, signed),
    )
    return scale, zero_point


def refine_codes(
    weight: Array,
    hessian: Array,
    num_bits: int,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    order: Array | None = None,
    sweeps: int = 1,
) -> tuple[Any, int]:
    """Cyclic coordinate descent on ``(w - q) H (w - q)^T`` from ``codes`` on, with grids as given.

    Each code in turn goes to the minimum on its grid, ``sweeps`` times through ``order`` (int32 [in], columns as they
    come by default) or until nothing changes. The objective does not rise. Returns (codes, number of changes).
    """
    out = contiguous(_copy(codes))
    changed = _core.refine_codes(
        memory(weight),
        memory(hessian),
        num_bits,
        memory(scale),
        _optional(zero_point),
        _optional(order),
        sweeps,
        memory(out),
    )
    return out, changed


def refit_scales(
    weight: Array,
    hessian: Array,
    num_bits: int,
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
) -> tuple[Any, int]:
    """Least squares on ``(w - q) H (w - q)^T`` over the scales of every row, jointly, with codes as given.

    Scales keep their dtype, to which they are rounded, and their sign; where that does not lower a row's objective it
    keeps its old ones. Up to 1024 groups. Returns (scale, number of rows that changed).
    """
    out = contiguous(_copy(scale))
    changed = _core.refit_scales(
        memory(weight), memory(hessian), num_bits, memory(codes), _optional(zero_point), memory(out)
    )
    return out, changed


def prox_linf(values: Array, step: float, group_size: int = 0) -> Any:
    """``argmin_x ||x - v||^2 / 2 + step ||x||_inf`` for every row v of ``values``, or group of ``group_size`` of it.

    float32 [rows, in]. It is v less the projection of v on the l1 ball of radius ``step`` (Moreau; Duchi et al., ICML
    2008), the proximal step of MagR (Zhang et al., NeurIPS 2024).
    """
    out = empty(values, _shape("prox_linf", "values", values), "float32")
    _core.prox_linf(memory(values), group_size, step, memory(out))
    return out


def project_l1(values: Array, radius: float, group_size: int = 0) -> Any:
    """The nearest point of the l1 ball of ``radius`` to every row of ``values``, or group of ``group_size`` of it."""
    out = empty(values, _shape("project_l1", "values", values), "float32")
    _core.project_l1(memory(values), group_size, radius, memory(out))
    return out


def rounding_loss(
    weight: Array,
    hessian: Array,
    num_bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    scale_dtype: str = "float32",
    *,
    column_scale: Array | None = None,
) -> float:
    """``tr(D H D^T)`` of the error D of rounding ``weight * s`` to nearest and dividing by s = ``column_scale`` [in].

    What AWQ's search minimises (Lin et al., MLSys 2024, equation 4). Of H the upper triangle is read.
    """
    return _core.rounding_loss(
        memory(weight), memory(hessian), _optional(column_scale), num_bits, group_size, symmetric, scale_dtype
    )


def accumulate_gram(x: Array, gram: Array, row_weight: Array | None = None) -> None:
    """``gram += x^T diag(row_weight) x`` on and above the diagonal, in place; what lies below stays.

    x is float32 or bfloat16 [n, in], its rows contiguous; gram [in, in] float64 or float32; row_weight float32 [n], all
    1 by default. Sums over 1024 rows are float32, so with float64
    ``|error| <= 1026 * 2^-24 * sum_n |x_ni x_nj weight_n|``. bfloat16 without weights is fastest where the CPU has AMX.
    """
    _core.accumulate_gram(memory(x), _optional(row_weight), memory(gram))
