"""Quantizers that benchmarks/ptq.py compares with: their environments, and how what they write is read."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from peer_builds import run

_logger = logging.getLogger("qtale")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Peer:
    """A package in an environment of its own; ``methods`` are those that it is measured with."""

    name: str
    package: str
    version: str
    script: str
    methods: Sequence[str]
    # Beside torch, which is the one that runs here; the package itself comes with "--no-deps" where this is not empty.
    needs: Sequence[str] = ()

    def python(self, work: Path) -> Path:
        """The environment's interpreter; installs the package where it is missing. Raises Error where pip fails."""
        folder = work / f"env-{self.name}"
        python = folder / "bin" / "python"
        if self._installed(python) == self.version:
            return python
        _logger.info("installing %s, which takes minutes; the output goes to %s", self.name, folder.with_suffix(".log"))
        log = folder.with_suffix(".log")
        run([sys.executable, "-m", "venv", folder], log)
        pip = [python, "-m", "pip", "install", "--quiet"]
        run([*pip, f"torch=={torch.__version__}", *self.needs], log)
        run([*pip, *(["--no-deps", "torchao"] if self.needs else []), f"{self.package}=={self.version}"], log)
        return python

    def _installed(self, python: Path) -> str:
        if not python.exists():
            return ""
        asked = f"from importlib.metadata import version; print(version({self.package!r}))"
        return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False).stdout.strip()


# GPTQModel asks for a newer torch than it needs, so all that it uses is named here.
_GPTQMODEL_NEEDS = (
    *("accelerate", "datasets", "defuser", "device-smi", "dill", "jinja2", "logbar", "maturin", "ninja", "packaging"),
    *("pillow", "protobuf", "pyarrow", "pypcre", "requests", "safetensors", "setuptools", "threadpoolctl", "tokenicer"),
    "transformers<5.24",
)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("llm-compressor", "llmcompressor", "0.14.0.1", "run_llm_compressor.py", ("gptq", "awq")),
        Peer("gptqmodel", "gptqmodel", "7.7.0", "run_gptqmodel.py", ("gptq",), _GPTQMODEL_NEEDS),
    )
}


def is_gptq(folder: Path) -> bool:
    """Whether the folder has GPTQ's own layout, which qtale does not load."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config", {}).get("quant_method") == "gptq"


def dequantize_gptq(folder: Path, out: Path) -> Path:
    """Write the weights that a GPTQ folder stands for as an ordinary float32 one, exactly; returns ``out``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bits = int(config["quantization_config"]["bits"])
    # Version 1 of the layout stores zero points less one.
    shift = 0 if config["quantization_config"].get("checkpoint_format") == "gptq_v2" else 1
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(path))
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    tensors = {f"{module}.weight": gptq_weight(stored, module, bits, shift) for module in modules}
    packed = tuple(f"{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales", "g_idx"))
    tensors.update({name: value for name, value in stored.items() if name not in packed})
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for pattern in _SMALL:
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    dense = {name: value for name, value in config.items() if name != "quantization_config"}
    (out / "config.json").write_text(json.dumps({**dense, "dtype": "float32"}), encoding="utf-8")
    return out


def gptq_weight(stored: dict[str, torch.Tensor], module: str, bits: int, shift: int) -> torch.Tensor:
    """The weight [out, in] of a module, float32: (code - zero point) * scale, codes along a little-endian stream."""
    codes = _unpack(stored[f"{module}.qweight"].T, bits)
    zeros = (_unpack(stored[f"{module}.qzeros"], bits) + shift) & ((1 << bits) - 1)
    scales = stored[f"{module}.scales"].float()
    groups = stored[f"{module}.g_idx"].long()
    return ((codes.T[: len(groups)] - zeros[groups]).float() * scales[groups]).T.contiguous()


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 [rows, words] as numbers [rows, words * 32 / bits]."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    single = np.unpackbits(raw, axis=1, bitorder="little")
    numbers = single.reshape(len(single), -1, bits).astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    return torch.from_numpy(numbers)
