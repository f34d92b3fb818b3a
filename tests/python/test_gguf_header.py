"""The header of a GGUF file: truncated, hostile or damaged, it ends in a sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from gguf_samples import tiny_model, write_gguf
from qtale.errors import CheckpointError, Error, UnsupportedError
from qtale.integrations.gguf import describe
from qtale.integrations.gguf_header import read_header


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama")).read_bytes()


@pytest.mark.parametrize(
    ("offset", "form", "value", "text"),
    [
        (0, "<I", 0x12345678, "not a GGUF file"),
        (4, "<I", 1, "version 1 is not supported"),
        (4, "<I", 3 << 24, "not supported"),
        (8, "<Q", 1 << 60, "tensors are announced"),
        (16, "<Q", 1 << 60, "metadata entries are announced"),
        (24, "<Q", (1 << 64) - 1, "the file ends"),
    ],
)
def test_hostile_counts(tmp_path: Path, good: bytes, offset: int, form: str, value: int, text: str) -> None:
    data = bytearray(good)
    struct.pack_into(form, data, offset, value)
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises((CheckpointError, UnsupportedError), match=text):
        read_header(tmp_path / "a.gguf")


def test_hostile_array_length_and_tensor_offset(tmp_path: Path, good: bytes) -> None:
    file = tmp_path / "a.gguf"
    array = good.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    tensor = good.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight")
    offset = tensor + 4 + 16 + 4
    for position, value, text in (
        (array, 1 << 61, "array elements are announced"),
        (offset, 1 << 40, "beyond the end"),
        (offset, 0, "overlaps"),
        (offset, 1, "misaligned"),
        (tensor + 4, 1 << 62, "beyond the end"),
    ):
        data = bytearray(good)
        struct.pack_into("<Q", data, position, value)
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=text):
            read_header(file)


def test_truncated_anywhere_is_a_sentence(tmp_path: Path, good: bytes) -> None:
    file = tmp_path / "a.gguf"
    for length in [*range(0, 400, 7), *range(400, len(good), 4999), len(good) - 1]:
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            describe(file)


def test_flipped_bytes_in_the_header_never_escape_the_errors(tmp_path: Path, good: bytes) -> None:
    file = tmp_path / "a.gguf"
    generator = random.Random(0)
    end = good.index(b"output_norm.weight") + 60
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(end)] = generator.choice((0, 255, generator.randrange(256)))
        file.write_bytes(data)
        try:
            describe(file)
        except Error:
            refused += 1
    assert refused > 30
