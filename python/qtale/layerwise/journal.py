"""What a long run has found so far, kept in a folder so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtale.checkpoint.index import read_json_object
from qtale.errors import Error, InputError
from qtale.files import write_whole

_FILE = "journal.json"
_LOCK = ".lock"


class Journal:
    """Entries by name, saved whole after every change; ``folder`` None keeps them in memory only."""

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / _FILE
        self._key = dict(key)
        self.entries: dict[str, Any] = {}
        if self._path is not None:
            self._read(self._path) if self._path.exists() else self._write(self._path)

    def _write(self, path: Path) -> None:
        write_whole(path, json.dumps({"key": self._key, "entries": self.entries}))

    def _read(self, path: Path) -> None:
        found = read_json_object(path)
        entries = found.get("entries")
        if not isinstance(entries, dict):
            raise InputError(f"{path}: is no journal of such a run; give another folder to --resume.")
        different = [name for name, value in self._key.items() if found.get("key", {}).get(name) != value]
        if different:
            raise InputError(
                f"{path}: belongs to a run with another {' and '.join(different)}; repeat that one exactly, or "
                "give another folder to --resume."
            )
        self.entries = entries

    def save(self, name: str, value: Any) -> None:
        """Set an entry; it is on the disk when this returns."""
        self.entries[name] = value
        if self._path is not None:
            self._write(self._path)


@contextlib.contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Make ``folder`` and keep other runs out of it.

    Raises InputError where one runs in it already or it holds other files, Error where it cannot be written.
    """
    if folder is None:
        yield
        return
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _FILE).exists() and any(folder.glob("[!.]*")):
            raise InputError(f"{folder}: holds other files; give --resume a folder of its own.")
    except OSError as error:
        raise Error(f"{folder}: cannot be used to resume from: {error.strerror or error}.") from error
    try:
        with filelock.FileLock(folder / _LOCK, blocking=False):
            yield
    except filelock.Timeout as error:
        raise InputError(f"{folder}: another run works in it; wait for it or give another folder.") from error
