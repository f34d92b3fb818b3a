"""Model folders: opened, sharded or not, refused when broken, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtale.checkpoint import ShardWriter, open_folder, output_folder, read_header, resolve
from qtale.checkpoint.index import INDEX_FILE
from qtale.checkpoint.writer import TensorShape
from qtale.errors import CheckpointError, Error, InputError, NetworkError, UnsupportedError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I8": torch.int8}
PARTS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(6, dtype=torch.float16).reshape(3, 2)},
}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_sharded(folder: Path, weight_map: Any = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for file, tensors in PARTS.items():
        save_file(tensors, folder / file)
    found = {name: file for file, tensors in PARTS.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": found if weight_map is None else weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_matrix_are_read_alone(tmp_path: Path, dtype: str) -> None:
    matrix = torch.arange(35).reshape(7, 5).to(DTYPES[dtype])
    save_file({"before": torch.ones(3), "m": matrix, "none": torch.empty(0, 5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    folder = open_folder(tmp_path)
    for rows in ([6, 0, 3, 3], [2], []):
        wanted = np.array(rows, dtype=np.int64)
        found = folder.torch_rows("m", wanted)
        assert found.dtype == matrix.dtype
        assert torch.equal(found, matrix[torch.from_numpy(wanted)])
    assert folder.torch_rows("none", np.empty(0, dtype=np.int64)).shape == (0, 5)
    for wrong in ([7], [-1, 2]):
        with pytest.raises(InputError, match="'m' has 7 rows; "):
            folder.torch_rows("m", np.array(wrong, dtype=np.int64))
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        folder.torch_rows("x", np.array([0]))


def test_a_sharded_folder_reads_every_tensor(tmp_path: Path) -> None:
    folder = open_folder(make_sharded(tmp_path / "m"))
    assert [shard.path.name for shard in folder.shards] == sorted(PARTS)
    assert folder.sharded
    assert folder.nbytes == 16 + 12 + 12
    for tensors in PARTS.values():
        for name, expected in tensors.items():
            assert folder.torch(name).dtype == expected.dtype
            assert torch.equal(folder.torch(name), expected)
            np.testing.assert_array_equal(folder.numpy(name), expected.float().numpy())
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        folder.torch("z")


def test_bfloat16_widens_exactly(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    save_file({"w": bits.view(torch.bfloat16)}, tmp_path / "model.safetensors")
    folder = open_folder(tmp_path)
    assert not folder.sharded
    np.testing.assert_array_equal(folder.numpy("w"), bits.view(torch.bfloat16).float().numpy())


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({}, "weight_map"),
        (["a"], "weight_map"),
        ({"a": "../secret.safetensors"}, "same folder"),
        ({"a": "/etc/x.safetensors"}, "same folder"),
        ({"a": "sub/model.safetensors"}, "same folder"),
        ({"a": "..\\model.safetensors"}, "same folder"),
        ({"a": "pytorch_model.bin"}, "same folder"),
        ({"a": 3}, "same folder"),
        ({"a": "absent.safetensors"}, "No such file"),
        ({"a": "model-00001-of-00002.safetensors"}, "'b'.*does not list it"),
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, "'b'.*says it lies"),
        (
            {name: file for file, tensors in PARTS.items() for name in tensors}
            | {"z": "model-00001-of-00002.safetensors"},
            "lacks tensor 'z'",
        ),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        open_folder(make_sharded(tmp_path / "m", weight_map))


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    save_file({"c": torch.zeros(1), "a": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'a'.*says it lies in"):
        open_folder(folder)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"pickle.*save_pretrained"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json.*JSON"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json.*object"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["./none", "/nowhere/model", "a/b/c", "~/no such folder", "a b", Path("none")])
def test_a_missing_folder_does_not_ask_the_hub(name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(name)


def test_files_in_place_of_folders(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="import-gguf"):
        resolve(tmp_path / "m.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="folder that holds it"):
        resolve(tmp_path / "model.safetensors")


def test_a_hub_name_downloads_the_config_then_the_shards_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_sharded(tmp_path / "snapshot")
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/name") == folder
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert [pattern for pattern in asked[1] if "safetensors" in pattern] == sorted(PARTS)


def test_a_hub_that_does_not_answer_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def unreachable(name: str, **_: Any) -> str:
        raise errors.LocalEntryNotFoundError("ConnectError: name not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(NetworkError, match=r"owner/name.*name not known.*give the path"):
        resolve("owner/name")


arrays = st.dictionaries(
    st.text("abc.0_", min_size=1, max_size=8),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(shapes=arrays, order=st.randoms(use_true_random=False))
def test_written_files_read_back_in_the_reference(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[str, list[int]]], order: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    tensors = {
        name: torch.randint(-100, 100, shape).to(DTYPES[dtype]) if shape else torch.tensor(5).to(DTYPES[dtype])
        for name, (dtype, shape) in shapes.items()
    }
    planned = [TensorShape(name, dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()]
    with ShardWriter(path, planned, {"format": "pt"}) as writer:
        for name in order.sample(sorted(tensors), len(tensors)):
            as_numpy = tensors[name].dtype != torch.bfloat16 and order.random() < 0.5
            writer.write(name, tensors[name].numpy() if as_numpy else tensors[name])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert loaded[name].dtype == expected.dtype
        assert torch.equal(loaded[name], expected)
    for info in read_header(path).tensors.values():
        assert info.start % {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}[info.dtype] == 0


def test_the_writer_refuses_wrong_sizes_and_missing_tensors(tmp_path: Path) -> None:
    planned = [TensorShape("a", "F32", (2,)), TensorShape("b", "F32", (2,))]
    with pytest.raises(InputError, match="4 bytes were given where 8"), ShardWriter(tmp_path / "x", planned, {}) as w:
        w.write("a", torch.zeros(1))
    with pytest.raises(InputError, match="1 tensors were announced"), ShardWriter(tmp_path / "y", planned, {}) as w:
        w.write("a", torch.zeros(2))


def test_an_output_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as target:
        (target / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert files_in(tmp_path) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


def test_existing_output_and_missing_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(InputError, match="exists already"), output_folder(out):
            pytest.fail("the folder must not be entered")
    with pytest.raises(InputError, match="does not exist"), output_folder(tmp_path / "no" / "out"):
        pytest.fail("the folder must not be entered")
    assert files_in(tmp_path) == ["dangling"]


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Error, "disk became full.*removed"),
        (OSError(errno.EACCES, "Permission denied"), Error, "cannot be written: Permission denied"),
        (InputError("wrong"), InputError, "wrong"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_any_failure_leaves_nothing(
    tmp_path: Path, failure: BaseException, kind: type[BaseException], sentence: str
) -> None:
    def fail(target: Path) -> None:
        (target / "file").write_text("x")
        raise failure

    with pytest.raises(kind, match=sentence), output_folder(tmp_path / "out") as target:
        fail(target)
    assert files_in(tmp_path) == []


def test_too_small_a_disk_is_told_before_writing(tmp_path: Path) -> None:
    sentence = rf"needs {2**60} bytes, but the disk has \d+ free"
    with pytest.raises(Error, match=sentence), output_folder(tmp_path / "out", 2**60):
        pytest.fail("the folder must not be entered")
    assert files_in(tmp_path) == []
