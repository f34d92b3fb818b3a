"""Builds other engines for this machine, outside of the repository; none of their code is part of qtale."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from qtale.bench import peer_folder
from qtale.errors import Error, InputError

LLAMA, IK = "llama.cpp", "ik_llama.cpp"
PACKAGE = "llama-cpp-python"
TOOLS = ("llama-bench", "llama-quantize")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    # Those of ik_llama.cpp hold llama-bench; only the programs that are asked for are built.
    "LLAMA_BUILD_EXAMPLES": "ON",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_logger = logging.getLogger("qtale")


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run a command at low priority; its output goes to ``log``, which the Error of a failure names."""
    with log.open("ab") as out:
        niced = [*(["nice", "-n", "15"] if shutil.which("nice") else []), *map(str, command)]
        done = subprocess.run(niced, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise Error(f"{' '.join(map(str, command))} failed with status {done.returncode}; see {log}.")


def download(cache: Path) -> Path:
    """The newest llama.cpp of the package index, unpacked under ``cache``: the sources inside of llama-cpp-python."""
    folder, log = cache / "download", cache / "download.log"
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", folder, PACKAGE]
    run(pip, log)
    archives = sorted(folder.glob("llama_cpp_python-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    if not archives:
        raise Error(f"pip left no source package of {PACKAGE} in {folder}; see {log}.")
    version = archives[-1].name.removeprefix("llama_cpp_python-").removesuffix(".tar.gz")
    target = cache / f"{LLAMA}-{version}"
    source = target / "source"
    if not source.is_dir():
        partial = target / "unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(partial, filter="data")
        (found,) = partial.glob(f"*/vendor/{LLAMA}")
        found.rename(source)
        shutil.rmtree(partial)
    return source


def compile_tools(source: Path, build: Path, tools: Sequence[str]) -> Path:
    """Build ``tools`` with native flags in ``build``; returns the folder of the programs."""
    if not (source / "CMakeLists.txt").is_file():
        raise InputError(f"{source}: holds no CMakeLists.txt; give the folder of the sources.")
    programs = build / "bin"
    if all((programs / tool).is_file() for tool in tools):
        return programs
    build.mkdir(parents=True, exist_ok=True)
    log = build / "build.log"
    _logger.info("building %s, which takes minutes; its output goes to %s", source, log)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    defines = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    run(["cmake", "-S", source, "-B", build, *generator, *defines], log)
    run(["cmake", "--build", build, "-j", str(os.cpu_count() or 1), "--target", *tools], log)
    return programs


def llama_cpp(cache: Path | None = None, source: Path | None = None) -> Path:
    """Programs of llama.cpp: those of an earlier build in ``cache``, else built from ``source`` or the package index.

    Raises Error where pip, cmake or the compiler fail.
    """
    cache = cache or peer_folder()
    built = sorted(cache.glob(f"{LLAMA}*/build/bin/{TOOLS[-1]}"))
    if built and source is None:
        return built[-1].parent
    source = source or download(cache)
    build = source.parent / "build" if source.parent.parent == cache else cache / f"{LLAMA}-given" / "build"
    return compile_tools(source, build, TOOLS)


def ik_llama_cpp(source: Path, cache: Path | None = None) -> Path:
    """Programs of ik_llama.cpp, built from the sources at ``source``."""
    return compile_tools(source, (cache or peer_folder()) / IK / "build", TOOLS[:1])
