"""The measurement of a model on given tokens: one forward pass layer by layer, and walks over the loss if asked."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from qtale.checkpoint import ModelFolder, fingerprint, open_folder
from qtale.errors import InputError
from qtale.importance.file import Importance
from qtale.importance.forward import Forward, Tokens
from qtale.importance.losses import LossPass
from qtale.importance.metrics import make_metrics
from qtale.importance.options import LOSS_METRICS, MeasureOptions
from qtale.layerwise.journal import Journal, claimed
from qtale.layerwise.model import LayeredModel
from qtale.layerwise.states import MAX_MEMORY, States, open_states
from qtale.layerwise.tokens import check_tokens, check_vocabulary

_logger = logging.getLogger("qtale")


def measure_tokens(
    model: str | Path,
    tokens: Any,
    options: MeasureOptions | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    decode: Callable[[int], str] | None = None,
    resume: str | Path | None = None,
    max_memory: int = MAX_MEMORY,
    progress: bool = True,
) -> Importance:
    """Score the layers of a model folder by running token numbers ``tokens`` [sequences, length] through it.

    ``num_sequences`` and ``seq_len`` of the options are taken from ``tokens``. Hidden states of more than
    ``max_memory`` bytes lie in temporary files. With ``resume``, a folder, all state lies there and a run that was
    killed goes on with the layer it was in, giving the same result; a finished one leaves the folder as a record.
    ``decode`` turns a token number into the word that people read, ``data`` describes where the tokens came from.

    Peak memory is one layer in float32 and ``max_memory``; ``fisher`` needs three times a layer, ``jaccard`` the matrix
    of its tokens, and all metrics of the loss need the head in float32. Raises InputError for tokens or settings that
    do not fit the model, CheckpointError for broken weights, UnsupportedError for models that are not built as Llama
    is.
    """
    tokens = check_tokens(tokens, "measure")
    count, length = tokens.shape
    options = dataclasses.replace(options or MeasureOptions(), num_sequences=count, seq_len=length)
    folder = open_folder(model)
    where = None if resume is None else Path(resume).expanduser()
    source = {**(data or {}), "fingerprint": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()}
    with ExitStack() as stack:
        layered = stack.enter_context(closing(LayeredModel(folder)))
        _check_fit(tokens, options, layered)
        identity = _identity(folder, layered)
        key = {"model": identity["fingerprint"], "data": source["fingerprint"], "settings": options.to_json()}
        stack.enter_context(claimed(where))
        journal = Journal(where, key)
        nbytes = _state_bytes(layered, options)
        states = stack.enter_context(open_states(where, (length, layered.hidden_size), nbytes, max_memory))
        _run(layered, states, tokens, options, journal, progress)
    found = _result(journal.entries, options, identity, source, decode)
    return dataclasses.replace(found, tokens=tokens[: options.loss_sequences].tolist())


def _check_fit(tokens: Tokens, options: MeasureOptions, layered: LayeredModel) -> None:
    check_vocabulary(tokens, layered.vocab_size, "measure")
    if "jaccard" in options.metrics and options.top_k > layered.vocab_size:
        raise InputError(
            f"measure: top_k {options.top_k} is more than the {layered.vocab_size} tokens of the vocabulary; take less."
        )


def _identity(folder: ModelFolder, layered: LayeredModel) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(folder),
        "path": str(folder.path),
        "model_type": str(folder.config.get("model_type")),
        "num_layers": layered.num_layers,
    }


def _state_bytes(layered: LayeredModel, options: MeasureOptions) -> int:
    """Bytes of all hidden states that are held at once."""
    row = options.seq_len * layered.hidden_size * 4
    used = min(options.loss_sequences, options.num_sequences)
    loss = (layered.num_layers + 3) * used if set(LOSS_METRICS) & set(options.metrics) else 0
    return row * (2 * options.num_sequences + loss)


def _run(
    layered: LayeredModel, states: States, tokens: Tokens, options: MeasureOptions, journal: Journal, progress: bool
) -> None:
    from tqdm.auto import tqdm

    metrics = make_metrics(options, layered.scale_dtype)
    total = layered.num_layers * len(tokens)
    with tqdm(total=total, desc="measure", unit="layer·seq", disable=not progress) as bar:
        Forward(layered, states, tokens, options, journal, metrics).run(bar)
    loss = LossPass(layered, states, tokens[: options.loss_sequences], options, journal)
    for name, walk in (("fisher", loss.fisher), ("noise", loss.noise), ("kl", loss.kl)):
        if name in options.metrics:
            with tqdm(total=layered.num_layers, desc=name, unit="layer", disable=not progress) as bar:
                walk(bar)
    loss.clear()


def _result(
    entries: Mapping[str, Any],
    options: MeasureOptions,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    decode: Callable[[int], str] | None,
) -> Importance:
    layers = entries["layers"]
    scores: dict[str, list[float]] = {}
    per_sequence: dict[str, list[list[float]]] = {}
    for metric in layers[0]["scores"]:
        scores[metric] = [layer["scores"][metric][0] for layer in layers]
        columns = [layer["scores"][metric][1] for layer in layers]
        if columns[0]:
            per_sequence[metric] = [list(row) for row in zip(*columns, strict=True)]
    costs = {}
    if "fisher" in entries:
        by_layer = [entries["fisher"][str(index)] for index in range(len(layers))]
        costs["fisher"] = {bits: _merged(layer[bits] for layer in by_layer) for bits in by_layer[0]}
        scores["fisher"] = [sum(layer[str(options.error_bits)].values()) for layer in by_layer]
    if "noise" in entries:
        scores["noise"] = entries["noise"]
    if "kl" in entries:
        by_layer = [entries["kl"][str(index)] for index in range(len(layers))]
        scores["kl"] = [layer[str(options.error_bits)] for layer in by_layer]
        if "fisher" in entries:
            costs["kl"] = _shared_out(by_layer, [entries["fisher"][str(index)] for index in range(len(layers))])
    errors = {bits: _merged(layer["errors"][bits] for layer in layers) for bits in layers[0]["errors"]}
    boundaries = [entries["first_sets"], *(layer["sets"] for layer in layers)]
    sets = [] if boundaries[0] is None else [list(row) for row in zip(*boundaries, strict=True)]
    words = {} if decode is None else _words(sets, decode)
    ordered = {metric: scores[metric] for metric in options.metrics}
    return Importance(model, data, options.to_json(), ordered, per_sequence, errors, costs, sets, words)


def _shared_out(
    totals: Sequence[Mapping[str, float]], predicted: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """What was measured by layer as bits → module, in proportion to what ``fisher`` predicts for the modules."""
    found: dict[str, dict[str, float]] = {}
    for layer, costs in zip(totals, predicted, strict=True):
        for bits, total in layer.items():
            whole = math.fsum(costs[bits].values())
            shares = {name: cost / whole if whole else 1 / len(costs[bits]) for name, cost in costs[bits].items()}
            found.setdefault(bits, {}).update({name: total * share for name, share in shares.items()})
    return found


def _merged(parts: Any) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


def _words(sets: Sequence[Sequence[Sequence[int]]], decode: Callable[[int], str]) -> dict[str, str]:
    tokens = sorted({token for sequence in sets for boundary in sequence for token in boundary})
    return {str(token): decode(token) for token in tokens}
