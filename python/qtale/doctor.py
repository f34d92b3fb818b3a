"""What qtale finds on this machine: ``python -m qtale.doctor``, ``qtale doctor``, :func:`report`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale import __version__
from qtale.errors import Error
from qtale.memory import host
from qtale.memory.sizes import human_bytes

REQUIRED = (
    *("torch", "transformers", "lm-eval", "numpy", "safetensors", "tokenizers", "huggingface_hub", "datasets"),
    *("accelerate", "gguf", "tqdm"),
)
OPTIONAL = ("compressed-tensors", "matplotlib")
VARIABLES = ("QTALE_CPU_ISA", "QTALE_NUM_THREADS", "QTALE_LOG_LEVEL", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class DoctorReport:
    """Versions, instruction sets, threads, memory in bytes, CUDA and caches; ``problems`` says what to mend and how.

    ``isa`` is the instruction set in use and ``isas`` what this CPU and build can run, slowest first.
    ``memory_limit`` is the control group's, None where there is none.
    """

    qtale: str
    python: str
    platform: str
    packages: dict[str, str | None]
    compiler: str | None
    cpu: str
    cpus: int
    threads: int | None
    isa: str | None
    isas: tuple[str, ...]
    memory_total: int | None
    memory_available: int | None
    memory_limit: int | None
    cuda: bool
    cuda_reason: str
    caches: dict[str, str]
    environment: dict[str, str]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """The report as lines of ``name  value``."""
        memory = ", ".join(
            f"{human_bytes(value)} {label}"
            for label, value in (
                ("in all", self.memory_total),
                ("available", self.memory_available),
                ("allowed by the control group", self.memory_limit),
            )
            if value is not None
        )
        rows = [
            ("qtale", f"{self.qtale} on Python {self.python}, {self.platform}"),
            ("core", f"built with {self.compiler}" if self.compiler else "not loaded"),
            ("CPU", f"{self.cpu}, {self.cpus} usable"),
            ("instruction set", f"{self.isa or 'none'} in use, of {', '.join(self.isas) or 'none'}"),
            ("threads", str(self.threads or "unknown")),
            ("memory", memory or "unknown"),
            ("CUDA", "built" if self.cuda else f"not built: {self.cuda_reason}"),
            *((name, version or "not installed") for name, version in self.packages.items()),
            *((f"{name} cache", path) for name, path in self.caches.items()),
            *self.environment.items(),
            *(("PROBLEM", problem) for problem in self.problems),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def report() -> DoctorReport:
    """Look at this machine, without importing torch or transformers; what is wrong stands in ``problems``."""
    problems: list[str] = []
    core = _core_facts(problems)
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [name for name in REQUIRED if packages[name] is None]
    if missing:
        problems.append(f"missing packages: run `pip install {' '.join(missing)}`.")
    meminfo = host.meminfo()
    return DoctorReport(
        qtale=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        cpu=_cpu_name(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_total=meminfo.get("MemTotal"),
        memory_available=meminfo.get("MemAvailable"),
        memory_limit=host.group_limit(),
        caches=_caches(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        problems=tuple(problems),
        **core,
    )


def _core_facts(problems: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"compiler": None, "threads": None, "isa": None, "isas": ()}
    facts.update(cuda=False, cuda_reason="the core is not loaded")
    try:
        from qtale import _core
    except ImportError as error:
        problems.append(f"the compiled core cannot be loaded ({error}); install again with `pip install .`.")
        return facts
    info = _core.build_info()
    facts.update(compiler=info["compiler"], cuda=info["cuda"], cuda_reason=info["cuda_reason"])
    facts.update(threads=_core.num_threads(), isas=tuple(_core.cpu_isas()))
    try:
        facts["isa"] = _core.cpu_isa()
    except Error as error:
        problems.append(str(error))
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    try:
        from huggingface_hub import constants
    except ImportError:
        return {}
    return {"models": constants.HF_HUB_CACHE, "demo": str(Path(constants.HF_ASSETS_CACHE) / "qtale")}


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m qtale.doctor [--json]``; returns 1 where there are problems."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m qtale.doctor", description="show what qtale finds here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return show(report(), parser.parse_args(argv).json)


def show(found: DoctorReport, as_json: bool) -> int:
    """Print a report; returns 1 where it names problems, else 0."""
    print(json.dumps(found.to_json()) if as_json else found.text())
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
