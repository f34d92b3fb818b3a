"""Headers of safetensors files are untrusted: what qtale accepts, the reference implementation accepts too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from qtale.checkpoint import Shard, read_header
from qtale.checkpoint.safetensors import ITEM_BYTES, read_raw
from qtale.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I8", "shape": [3], "data_offsets": [16, 19]},
    "c": {"dtype": "F16", "shape": [], "data_offsets": [19, 21]},
}
GOOD_BYTES = 21


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


def write(path: Path, header: Any, data: int = GOOD_BYTES, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def changed(tensor: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, tensor: {**GOOD[tensor], **fields}}


def test_a_good_file_is_read(file: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4), dtype=np.int64)}
    save_file(arrays, file, metadata={"format": "pt"})
    shard = read_header(file)
    assert shard.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in shard.tensors.items()} == {"x": (2, 3), "empty": (0, 4)}
    assert shard.tensors["x"].numel == 6
    np.testing.assert_array_equal(read_raw(file, shard.tensors["x"]).view(np.float32), np.arange(6))
    assert read_raw(file, shard.tensors["empty"]).size == 0


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (changed("a", dtype="F33"), "'a' has dtype 'F33'"),
        (changed("a", dtype=["F32"]), "'a' has dtype"),
        (changed("a", dtype="F64"), "'a': F64 of shape .* needs 32 bytes"),
        (changed("a", shape=[2, -2]), "'a' has shape"),
        (changed("a", shape=[2, 2.0]), "'a' has shape"),
        (changed("a", shape=[True, 4]), "'a' has shape"),
        (changed("a", shape="22"), "'a' has shape"),
        (changed("a", shape=[2**62, 2**62]), "overflows"),
        (changed("a", shape=[2**62, 2**62, 0]), "overflows"),
        (changed("a", shape=[2**64]), "'a' has shape"),
        (changed("a", data_offsets=[16, 0]), "data_offsets"),
        (changed("a", data_offsets=[0, 16, 16]), "data_offsets"),
        (changed("a", data_offsets=[-16, 0]), "data_offsets"),
        (changed("b", data_offsets=[15, 18]), "'b' at byte .* overlaps"),
        (changed("b", data_offsets=[17, 20]), "'b' at byte .* hole"),
        ({**GOOD, "d": GOOD["a"]}, "overlaps"),
        ({"a": GOOD["a"]}, "bytes after its last tensor"),
        ({**GOOD, "d": {"dtype": "U8", "shape": [9], "data_offsets": [21, 30]}}, "is truncated"),
        ({**GOOD, "d": {"dtype": "U8", "shape": [0]}}, "'d': its header entry must hold"),
        ({**GOOD, "d": 7}, "'d': its header entry must hold"),
        ({**GOOD, "__metadata__": {"x": 1}}, "__metadata__"),
        ({**GOOD, "__metadata__": []}, "__metadata__"),
        ({**GOOD, "e\x1b[2J": {"dtype": "U8", "shape": [0], "data_offsets": [21, 21]}}, "not printable"),
        ([1, 2], "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON|JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON|header entry"),
        (b'{"a":{"dtype":"U8","shape":[21],"data_offsets":[0,21]},"a":{}}', "'a' twice"),
    ],
)
def test_hostile_headers_name_file_and_tensor(file: Path, header: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_header(write(file, header))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("length", "sentence"), [(2**63, "truncated"), (2**64 - 1, "truncated"), (10_000, "truncated"), (0, "JSON")]
)
def test_a_header_length_that_lies(file: Path, length: int, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_header(write(file, GOOD, length=length))


def test_a_header_above_the_limit_is_refused_before_it_is_read(file: Path) -> None:
    write(file, GOOD, length=100_000_001)
    with file.open("r+b") as handle:
        handle.truncate(8 + 100_000_001)
    with pytest.raises(CheckpointError, match="claims 100000001 bytes"):
        read_header(file)


@pytest.mark.parametrize("size", range(0, 40, 3))
def test_every_truncation_is_an_error(file: Path, size: int) -> None:
    whole = write(file, GOOD).read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(CheckpointError):
        read_header(file)
    file.write_bytes(whole[: len(whole) - 1 - size % GOOD_BYTES])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        read_header(tmp_path)


def test_a_file_that_shrinks_after_the_check_is_an_error(file: Path) -> None:
    shard = read_header(write(file, GOOD))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"'b'.*changed"):
        read_raw(file, shard.tensors["b"])


numbers = st.one_of(st.integers(-2, 24), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64]), st.just(1.5))
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*ITEM_BYTES, "f32", "", None]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
    ),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), st.none(), max_size=4),
)


@st.composite
def laid_out_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Tensors one after the other, and the bytes that they take."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header, position


def assert_the_reference_agrees(path: Path, shard: Shard) -> None:
    with safe_open(path, framework="np") as reference:
        assert set(reference.keys()) == set(shard.tensors)
        for name, info in shard.tensors.items():
            piece = reference.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == (info.dtype, info.shape)


@settings(max_examples=150, deadline=None)
@given(laid_out=laid_out_headers())
def test_well_formed_headers_are_accepted(file: Path, laid_out: tuple[dict[str, Any], int]) -> None:
    shard = read_header(write(file, *laid_out))
    assert {name: list(info.shape) for name, info in shard.tensors.items()} == {
        name: entry["shape"] for name, entry in laid_out[0].items()
    }
    assert_the_reference_agrees(file, shard)


@settings(max_examples=400, deadline=None)
@given(laid_out=laid_out_headers(), change=entries, extra=st.sampled_from([0, 0, 0, -1, 1]), data=st.data())
def test_what_qtale_accepts_of_damaged_headers_the_reference_reads_alike(
    file: Path, laid_out: tuple[dict[str, Any], int], change: dict[str, Any], extra: int, data: st.DataObject
) -> None:
    header, size = laid_out
    header[data.draw(st.sampled_from(sorted(header)))].update(change)
    write(file, header, max(0, size + extra))
    try:
        shard = read_header(file)
    except CheckpointError:
        return
    assert_the_reference_agrees(file, shard)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 250), value=st.integers(0, 255))
def test_one_wrong_byte_gives_an_error_or_a_consistent_file(file: Path, position: int, value: int) -> None:
    raw = bytearray(write(file, GOOD).read_bytes())
    raw[position % len(raw)] = value
    file.write_bytes(raw)
    try:
        shard = read_header(file)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in shard.tensors.values()) <= GOOD_BYTES
    for info in shard.tensors.values():
        assert read_raw(file, info).nbytes == info.numel * ITEM_BYTES[info.dtype]
