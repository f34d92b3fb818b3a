"""Outputs large enough to be written past the caches, against the scalar reference, bit for bit."""

import numpy as np
import pytest

from qtale import _core, ops

ROWS, COLS = 700, 2048  # more than a MiB of codes on one thread


@pytest.fixture
def one_thread():
    isa, threads = _core.cpu_isa(), _core.num_threads()
    _core.set_num_threads(1)
    yield
    _core.set_num_threads(threads)
    _core.set_cpu_isa(isa)


def results(isa: str, dtype: str, group: int, symmetric: bool) -> list[np.ndarray]:
    _core.set_cpu_isa(isa)
    weight = np.random.default_rng(0).standard_normal((ROWS, COLS), dtype=np.float32).astype(dtype)
    codes, scale, zero_point = ops.quantize(weight, 4, group, symmetric)
    back = ops.dequantize(codes, scale, zero_point)
    return [codes, scale, back] if symmetric else [codes, scale, zero_point, back]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_streamed_outputs_equal_the_reference(one_thread, dtype, group, symmetric):
    expected = results("reference", dtype, group, symmetric)
    for isa in _core.cpu_isas()[1:]:
        for got, want in zip(results(isa, dtype, group, symmetric), expected, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=isa, strict=True)
