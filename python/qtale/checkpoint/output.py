"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtale.errors import Error, InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(out: Path) -> None:
    """Raise InputError where ``out`` exists already: qtale never overwrites a folder."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; give another output folder or remove it first.")


@contextmanager
def output_folder(out: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a hidden folder beside ``out`` to write into; it becomes ``out`` at the end, or vanishes on any error.

    ``needed_bytes`` is checked against the free space first. Raises InputError where ``out`` exists or its parent
    does not, and Error where the disk is full or cannot be written.
    """
    out = Path(out).expanduser()
    check_output(out)
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{out}: the folder {parent} does not exist; create it first.")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise Error(f"{out}: needs {needed_bytes} bytes, but the disk has {free} free; nothing was written.")
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
        yield temporary
        _publish(temporary, out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise Error(_sentence(out, error)) from error
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, flushed to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, out: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    _sync_folder(temporary)
    check_output(out)
    temporary.rename(out)
    _sync_folder(out.absolute().parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sentence(out: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"{out}: the disk became full while writing; what was written is removed. Free some space and try again."
    return f"{out}: cannot be written: {error.strerror or error}; what was written is removed."
