"""``qtale.measure``: a model folder and a calibration text in, the importance of every layer out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint import resolve
from qtale.importance.options import MeasureOptions
from qtale.layerwise.states import MAX_MEMORY

if TYPE_CHECKING:
    from qtale.importance.file import Importance


def measure(
    model: str | Path,
    options: MeasureOptions | None = None,
    *,
    calibration: str | Path = "bundled",
    tokens: Any = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    max_memory: int = MAX_MEMORY,
    progress: bool = True,
) -> Importance:
    """Score the decoder layers of a dense model, one layer in memory at a time, and optionally write ``out``.

    ``model`` is a folder or a hub name. Sequences come from ``calibration`` (see
    :func:`qtale.integrations.calibration.calibrate`), or are given as ``tokens``, token numbers [sequences, length];
    then importance.json has no words. ``resume`` is a folder that lets a killed run go on; hidden states of more than
    ``max_memory`` bytes lie in temporary files. Raises what ``calibrate`` and
    :func:`qtale.importance.measure_tokens` raise, and InputError where ``out`` exists.
    """
    from qtale.importance.file import check_new
    from qtale.importance.measure import measure_tokens
    from qtale.integrations.calibration import calibrate

    if out is not None:
        check_new(Path(out).expanduser())
    options = options or MeasureOptions()
    folder, data, decode = resolve(model), {"source": "tokens"}, None
    if tokens is None:
        drawn = calibrate(folder, calibration, options.num_sequences, options.seq_len, options.seed)
        tokens, data, decode = drawn.tokens, drawn.data, drawn.decode
    importance = measure_tokens(
        folder, tokens, options, data=data, decode=decode, resume=resume, max_memory=max_memory, progress=progress
    )
    if out is not None:
        importance.write(out)
    return importance
