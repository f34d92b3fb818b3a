"""Quantized folders that are made once and kept: what `qtale eval --method` scores."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from qtale.checkpoint import fingerprint
from qtale.errors import Error
from qtale.ptq.options import SolverOptions
from qtale.spec import QuantSpec

_logger = logging.getLogger("qtale")
# Part of the key, so that a changed solver never meets folders of an older one.
_LAYOUT = "1"


def quantized_folder(model: Path, spec: QuantSpec, options: SolverOptions, *, progress: bool = True) -> Path:
    """The folder that ``qtale quantize`` makes of ``model`` with the bundled calibration text; later calls find it.

    It lies in HuggingFace's asset cache (``HF_ASSETS_CACHE`` or ``HF_HOME`` moves it). A run that was killed goes on
    where it stopped. Raises what :func:`qtale.quantize` raises, and Error where the cache cannot be written.
    """
    import filelock
    import huggingface_hub

    from qtale.integrations.quantize import quantize

    wanted = [_LAYOUT, fingerprint(model), asdict(spec), options.to_json()]
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{model.name}-{spec.num_bits}bit-{options.method}-{key}"
    try:
        root = Path(huggingface_hub.cached_assets_path("qtale", "quantized", _LAYOUT))
    except OSError as error:
        raise Error(
            f"quantize: the cache folder cannot be created ({error}); set HF_ASSETS_CACHE to a folder that can be "
            "written."
        ) from error
    found, state = root / name, root / f".{name}.state"
    with filelock.FileLock(root / f".{name}.lock"):
        if not found.exists():
            _logger.info("calibrating %s to %d bits, once: it is kept in %s", model.name, spec.num_bits, found)
            quantize(model, found, spec, method=options, resume=state, progress=progress)
        shutil.rmtree(state, ignore_errors=True)
    return found
