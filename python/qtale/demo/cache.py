"""Where the demo data lives, and the lock that lets several processes ask for it at once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtale.errors import Error

logger = logging.getLogger("qtale")

# Part of the path, so that a changed conversion never meets folders made by an older one.
_LAYOUT = "1"


def root() -> Path:
    """The demo's folder in HuggingFace's asset cache, created if missing; Error where it cannot be."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.cached_assets_path("qtale", "demo", _LAYOUT))
    except OSError as error:
        raise Error(
            f"demo: the cache folder cannot be created ({error}); set HF_ASSETS_CACHE to a folder that can be written."
        ) from error


@contextmanager
def locked() -> Iterator[Path]:
    """Yield ``root()`` while no other process fills it; leftovers of interrupted ones are removed first."""
    import filelock

    folder = root()
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        logger.info("demo: another process is filling %s; waiting for it", folder)
        lock.acquire()
    try:
        for leftover in folder.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield folder
    finally:
        lock.release()
