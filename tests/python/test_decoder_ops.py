"""The operators of a decoder block as Python reaches them, against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtale import _core
from qtale.errors import InputError
from qtale.tensors import memory


def test_rms_norm_is_that_of_torch() -> None:
    x, weight = torch.randn(5, 40), torch.randn(40)
    out = torch.empty_like(x)
    _core.rms_norm(memory(x), memory(weight), 1e-5, memory(out))
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (40,), weight, 1e-5))


def test_silu_mul_is_that_of_torch() -> None:
    gate_up, out = torch.randn(3, 70), torch.empty(3, 35)
    _core.silu_mul(memory(gate_up), memory(out))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate_up[:, :35]) * gate_up[:, 35:])


def test_rope_turns_halves_against_each_other() -> None:
    angles = torch.outer(torch.arange(9.0), 10000.0 ** -(torch.arange(8) / 8))
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.tensor([4, 0, 8], dtype=torch.int32)
    x = torch.randn(3, 2, 16)
    cos, sin = (part.repeat(1, 2)[:, None] for part in (angles[positions].cos(), angles[positions].sin()))
    expected = x * cos + torch.cat([-x[..., 8:], x[..., :8]], dim=-1) * sin
    _core.rope(memory(x), memory(table), memory(positions))
    torch.testing.assert_close(x, expected)


def pages_of(count: int, kv_heads: int, head_dim: int, dtype: str) -> list[np.ndarray]:
    return [np.zeros(_core.kv_page_bytes(kv_heads, head_dim, dtype), np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("compute", "atol"), [("float", 1e-5), ("int8", 0.02)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_attention_is_that_of_torch(dtype: str, compute: str, atol: float) -> None:
    heads, kv_heads, head_dim, entries = 6, 2, 32, 50
    if dtype == "int8":
        if not _core.has_int8_keys(head_dim):
            pytest.skip("keys of 8 bits need AVX-512 BF16")
        atol = 0.03
    k, v = (torch.randn(entries, kv_heads, head_dim) for _ in range(2))
    q = torch.randn(entries, heads, head_dim)
    pages = pages_of(4, kv_heads, head_dim, dtype)
    views = [memory(page) for page in pages]
    for first, last in ((0, 20), (20, entries)):
        _core.kv_append(memory(k[first:last]), memory(v[first:last]), views, first, dtype)
    begin, end = torch.zeros(entries, dtype=torch.int32), torch.arange(1, entries + 1, dtype=torch.int32)
    out = torch.empty_like(q)
    runs = [(30, views), (20, views)]
    _core.attention(memory(q), runs, memory(begin), memory(end), kv_heads, dtype, head_dim**-0.5, memory(out), compute)
    kept = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    stored = [x.to(kept).float().transpose(0, 1).repeat_interleave(3, dim=0) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *stored, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=1e-4, atol=atol)


def test_pages_of_another_size_are_refused() -> None:
    k = torch.randn(1, 2, 32)
    pages = [memory(page) for page in pages_of(1, 1, 32, "float16")]
    with pytest.raises(InputError, match="a page is not contiguous memory of 4096 bytes"):
        _core.kv_append(memory(k), memory(k), pages, 0, "float16")
