"""Calibrated quantization of a model's decoder layers: one layer in memory at a time, resumable after every layer."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.identity import fingerprint
from qtale.layerwise.journal import Journal, claimed
from qtale.layerwise.model import LayeredModel
from qtale.layerwise.states import MAX_MEMORY, open_states
from qtale.layerwise.tokens import Tokens, check_vocabulary
from qtale.memory.host import available
from qtale.memory.sizes import human_bytes
from qtale.process import release, return_large_blocks
from qtale.ptq import products
from qtale.ptq.layer import LayerSolver
from qtale.ptq.options import SolverOptions
from qtale.ptq.recipe import recipe_of
from qtale.ptq.solved import SolvedLayers
from qtale.ptq.streams import BATCH_TOKENS, DENSE, QUANTIZED, Streams
from qtale.ptq.tune import TuneOptions, needed_bytes, tune
from qtale.ptq.tuning_state import TuningState
from qtale.ptq.worklist import LayerRow

_logger = logging.getLogger("qtale")


@dataclass(frozen=True)
class Calibrated:
    """Finished layers: their files, later ones over earlier ones, and errors and seconds of every matrix by name."""

    layers: SolvedLayers
    files: tuple[str, ...]
    found: Mapping[str, Mapping[str, float]]


@contextmanager
def solve_layers(
    folder: ModelFolder,
    rows: Mapping[str, LayerRow],
    options: SolverOptions,
    tokens: Tokens,
    *,
    resume: str | Path | None = None,
    max_memory: int = MAX_MEMORY,
    progress: bool = True,
) -> Iterator[Calibrated]:
    """Solve the matrices ``rows`` on calibration ``tokens`` [sequences, length] and yield the finished layers.

    With ``resume``, a folder, layers and hidden states lie there and a run that was killed goes on with the layer it
    was in; otherwise hidden states of more than ``max_memory`` bytes lie in temporary files. Raises InputError for
    tokens the model does not have and for a folder of another run, CheckpointError for broken weights or files.
    """
    where = None if resume is None else Path(resume).expanduser()
    widest = max((max(row.shape) for row in rows.values()), default=0)
    return_large_blocks(over=5 * BATCH_TOKENS * widest)  # float32 states of a batch, and a little more
    with ExitStack() as stack:
        model = stack.enter_context(closing(LayeredModel(folder, "quantize")))
        check_vocabulary(tokens, model.vocab_size, "quantize")
        stack.enter_context(claimed(where))
        journal = Journal(where, _key(folder, rows, options, tokens))
        recipes = [recipe_of(options, row.spec) for row in rows.values()]
        beside = any(recipe.awq for recipe in recipes)
        kinds = (QUANTIZED, DENSE) if beside else (QUANTIZED,)
        nbytes = (2 * len(kinds) + 1) * tokens.size * model.hidden_size * 4
        states = stack.enter_context(open_states(where, (tokens.shape[1], model.hidden_size), nbytes, max_memory))
        layers = SolvedLayers(where or stack.enter_context(_temporary()))
        run = _Run(model, Streams(model, states, tokens, kinds), rows, options, journal, layers)
        found = run.run(progress)
        files = [_file(index) for index in range(model.num_layers)]
        # Tuning holds the whole model, and writing reads the solved one; what ran layer by layer goes first.
        model.close()
        release()
        if options.tuning and rows:
            state = None if where is None else TuningState(journal, layers)
            files += _tuned(folder, rows, tokens, options, journal, layers, files, state, progress)
        yield Calibrated(layers, tuple(files), found)


def _file(index: int) -> str:
    return f"layer-{index}"


def _tuned(
    folder: ModelFolder,
    rows: Mapping[str, LayerRow],
    tokens: Tokens,
    options: SolverOptions,
    journal: Journal,
    layers: SolvedLayers,
    files: list[str],
    state: TuningState | None,
    progress: bool,
) -> list[str]:
    """Tune all layers together where memory allows it; the files that this adds."""
    from tqdm.auto import tqdm

    name = "tuned"
    if name in journal.entries:
        layers.check(name, journal.entries[name]["file"])
        return [name]
    settings = TuneOptions(options.tuning, options.seed, compute_dtype=options.compute_dtype)
    needed, free = needed_bytes(folder, tokens.shape[1], settings), available()
    if free is not None and needed > free:
        _logger.warning(
            "end-to-end tuning is left out: it needs about %s, but %s are free", human_bytes(needed), human_bytes(free)
        )
        return []
    with layers.reading(files) as solved, tqdm(total=settings.steps, desc="tune", disable=not progress) as bar:

        def done(loss: float) -> None:
            bar.set_postfix_str(f"divergence {loss:.4f}")
            bar.update()

        tuned = tune(folder, rows, solved, tokens, settings, done, state)
    journal.save(name, {"file": layers.write(name, tuned.tensors), "divergence": list(tuned.divergence)})
    return [name]


def _key(folder: ModelFolder, rows: Mapping[str, LayerRow], options: SolverOptions, tokens: Tokens) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was killed, by the name that an error gives it."""
    specs = [[name, row.num_bits, row.group_size, row.symmetric] for name, row in sorted(rows.items())]
    return {
        "model": fingerprint(folder),
        "calibration": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
        "bits and groups": specs,
        "sums of squares of inputs": products.input_sums(options.compute_dtype),
        **options.to_json(),
    }


@contextmanager
def _temporary() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="qtale-layers-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Run:
    model: LayeredModel
    streams: Streams
    rows: Mapping[str, LayerRow]
    options: SolverOptions
    journal: Journal
    layers: SolvedLayers

    def run(self, progress: bool) -> dict[str, Mapping[str, float]]:
        """Solve the layers that the journal lacks; returns what is known of every matrix."""
        from tqdm.auto import tqdm

        done = self._continue()
        total, sequences = self.model.num_layers, len(self.streams.tokens)
        with tqdm(
            total=total * sequences, initial=done * sequences, desc="solve", unit="layer·seq", disable=not progress
        ) as bar:
            for index in range(done, total):
                self._solve(index, bar)
        self.streams.drop(total)
        return {name: found for layer in self.journal.entries["layers"] for name, found in layer["found"].items()}

    def _continue(self) -> int:
        """The number of finished layers, their files and the states behind them checked."""
        entries = self.journal.entries
        if "layers" not in entries:
            self.streams.embed()
            self.journal.save("states", self.streams.seals(0))
            self.journal.save("layers", [])
        layers = entries["layers"]
        for index, layer in enumerate(layers):
            self.layers.check(_file(index), layer["file"])
            self.streams.drop(index)
        if len(layers) < self.model.num_layers:
            expected = layers[-1]["states"] if layers else entries["states"]
            self.streams.check(len(layers), expected)
        return len(layers)

    def _solve(self, index: int, bar: Any) -> None:
        with self.model.layer(index) as layer:
            solver = LayerSolver(self.model, self.streams, index, layer, self.rows, self.options)
            solver.run(bar.update)
        entry = {
            "file": self.layers.write(_file(index), solver.tensors),
            "states": self.streams.seals(index + 1),
            "found": solver.found,
        }
        self.journal.save("layers", [*self.journal.entries["layers"], entry])
        # What went into the layer is needed to repeat it, so it goes only when the result is on the disk.
        self.streams.drop(index)
        if solver.found:
            worst = max(solver.found, key=lambda name: solver.found[name]["output_error"])
            bar.set_postfix_str(f"layer {index}: worst {worst.rpartition('.')[2]} {_change(solver.found[worst])}")


def _change(found: Mapping[str, float]) -> str:
    return f"{found['rtn_output_error']:.2e} → {found['output_error']:.2e}"
