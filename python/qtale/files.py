"""Text files that appear whole or not at all, JSON files of results with every mistake named, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qtale.errors import CheckpointError, Error, InputError

# Measurements with their token sets take some tens of MB.
MAX_JSON_BYTES = 2 << 30
_READ_BYTES = 1 << 20


def read_json(path: Path, maker: str, most_bytes: int = MAX_JSON_BYTES, *, unique: bool = False) -> Any:
    """The value in a JSON file that ``maker`` writes, such as "`qtale plan`".

    Raises InputError where the file is missing, larger than ``most_bytes`` or no JSON, and with ``unique`` where a name
    stands twice in one object, of which one would be lost.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise InputError(f"{path}: is larger than {most_bytes} bytes, which nothing that {maker} writes needs.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not valid JSON ({error}).") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; make it with {maker}.") from error
    try:
        return json.loads(text, object_pairs_hook=_once if unique else None)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}).") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object.")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a text file, replacing what was there; on an error nothing changes. Raises Error."""
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Error(f"{path}: cannot be written: {error.strerror or error}.") from error
        raise


def checksum(path: Path) -> str:
    """The sha256 of a file in hexadecimal digits; CheckpointError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()
