"""``qtale.eval.evaluate``: a model, tasks of lm-evaluation-harness, and its results with one key of qtale's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.errors import Error, InputError
from qtale.eval.backend import engine_lm, refuse_engine_options
from qtale.eval.catalog import WIKITEXT
from qtale.eval.facts import size_facts, speed_facts
from qtale.eval.options import EvalOptions
from qtale.eval.perplexity import WINDOW, perplexity, wikitext2
from qtale.eval.sources import Source, choose
from qtale.eval.tasks import opened_tasks, task_names
from qtale.ptq.options import AUTO, RTN, SolverOptions
from qtale.routing import RoutingOverrides

if TYPE_CHECKING:
    from qtale.integrations.engine_lm import EngineLM
    from qtale.integrations.lm_eval import QtaleLM
    from qtale.spec import QuantSpec

    ScoringLM = EngineLM | QtaleLM

logger = logging.getLogger("qtale")

SCHEMA = 1
# Half of what `qtale quantize` takes by default: a first look should not wait longer.
_NUM_SAMPLES, _TUNE_STEPS = 64, 32
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


@dataclass(frozen=True)
class EvalOutcome:
    """``results`` is lm-eval's dictionary plus the key "qtale"; ``samples`` its documents by task, if logged."""

    results: dict[str, Any]
    samples: dict[str, Any] | None
    baseline: dict[str, Any] | None
    file: Path | None


def evaluate(options: EvalOptions) -> EvalOutcome:
    """Score a model on tasks by lm-eval's ``simple_evaluate``.

    Mistakes in tasks and data are found before the model is loaded. Raises InputError, CheckpointError,
    UnsupportedError or NetworkError, and Error where results cannot be written.
    """
    names = task_names(options.tasks)
    source = choose(options.data)
    _quieten()
    with (
        contextlib.redirect_stdout(sys.stderr),
        opened_tasks(names, source, options.num_fewshot, options.include_path) as (manager, matched),
    ):
        _check_loadable(manager, matched)
        return _Run(options, source, manager, matched).outcome()


def _quieten() -> None:
    """lm-eval warns about what qtale chooses on purpose; LMEVAL_LOG_LEVEL brings its voice back."""
    import datasets

    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR").upper())
    datasets.disable_progress_bars()


def _check_loadable(manager: Any, names: Sequence[str]) -> None:
    try:
        manager.load(list(names))
    except Error:
        raise
    except _LOADING_ERRORS as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(f"--tasks {','.join(names)}: lm-eval cannot load them: {reason.splitlines()[0]}") from error


class _Run:
    """One evaluation: the model as asked for, and a dense one beside it where a baseline is."""

    def __init__(self, options: EvalOptions, source: Source, manager: Any, names: list[str]) -> None:
        from qtale.engine.overrides import check_overrides
        from qtale.integrations.scoring_model import is_quantized, model_folder

        self.options, self.source, self.manager, self.names = options, source, manager, names
        self.folder = model_folder(options.model)
        if options.spec and is_quantized(self.folder):
            raise InputError(
                f"--model {options.model}: is quantized already, so --bits cannot be chosen; leave it out, or give the "
                "dense model."
            )
        self.dense_folder = self._dense_folder(is_quantized(self.folder))
        # Before a baseline is scored, which none of these concern.
        if options.backend == "torch":
            refuse_engine_options(options)
        check_overrides(options.routing, self.folder)

    def outcome(self) -> EvalOutcome:
        from lm_eval.loggers import EvaluationTracker

        options, baseline = self.options, None
        tracker = EvaluationTracker(output_path=str(options.output_path)) if options.output_path else None
        if self.dense_folder is not None:
            logger.info("eval: the dense baseline")
            baseline = self._scored(self.dense_folder, None, None)
            baseline.pop("samples", None)
        results = self._scored(*self._quantized(), tracker)
        samples = results.pop("samples", None)
        if baseline is not None:
            results["qtale"]["baseline"] = {"results": baseline["results"], **baseline["qtale"]}
        file = None if tracker is None else _save(tracker, results, samples, options)
        return EvalOutcome(results, samples, baseline, file)

    def _quantized(self) -> tuple[Path, QuantSpec | None]:
        """The folder to be scored and what to quantize it to in memory."""
        options = self.options
        if options.spec is None or options.method == RTN:
            return self.folder, options.spec
        from qtale.integrations.quantized_cache import quantized_folder

        tune_steps = _TUNE_STEPS if options.method == AUTO else None
        settings = SolverOptions(options.method, num_samples=_NUM_SAMPLES, tune_steps=tune_steps)
        return quantized_folder(self.folder, options.spec, settings), None

    def _dense_folder(self, quantized: bool) -> Path | None:
        from qtale.integrations.scoring_model import is_quantized, model_folder

        name = self.options.baseline
        if name is None:
            return None
        if not (quantized or self.options.spec):
            raise InputError(f"--baseline: {self.options.model} is scored as it is, dense; add --bits to compare with.")
        if not name and quantized:
            raise InputError(
                f"--baseline: {self.options.model} is quantized on disk; name its dense original, --baseline PATH."
            )
        folder = model_folder(name) if name else self.folder
        if is_quantized(folder):
            raise InputError(f"--baseline {name}: is quantized; name a dense model.")
        return folder

    def _scored(self, folder: Path, spec: Any, tracker: Any) -> dict[str, Any]:
        """lm-eval's results of one model, with the key "qtale"."""
        facts = size_facts(folder, spec)
        lm = self._lm(folder, spec)
        results = self._simple_evaluate(lm, folder, spec, tracker)
        facts |= speed_facts(lm)
        if WIKITEXT in self.names:
            window = min(WINDOW, lm.max_length)
            facts[WIKITEXT] = perplexity(lm, wikitext2(self.source), self.options.windows, window).to_json()
        results["qtale"] = self._described(folder, spec) | {"backend": lm.backend_name} | facts
        return results

    def _lm(self, folder: Path, spec: Any) -> ScoringLM:
        options = replace(self.options, routing=self._routing(folder, spec))
        return engine_lm(options, folder, spec) or self._torch_lm(folder, spec)

    def _torch_lm(self, folder: Path, spec: Any) -> QtaleLM:
        from qtale.integrations.lm_eval import QtaleLM
        from qtale.integrations.scoring_model import load_model, load_tokenizer, model_dtype

        options = self.options
        dtype = model_dtype(options.dtype, options.device)
        model = load_model(folder, spec, options.compute, dtype, options.device, options.trust_remote_code)
        return QtaleLM(
            model,
            load_tokenizer(folder, options.trust_remote_code),
            batch_size=options.batch_size,
            max_length=options.max_length,
        )

    def _simple_evaluate(self, lm: ScoringLM, folder: Path, spec: Any, tracker: Any) -> dict[str, Any]:
        import lm_eval

        options = self.options
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        results = lm_eval.simple_evaluate(
            model=lm,
            model_args=self._model_args(folder, spec),
            tasks=self.names,
            task_manager=self.manager,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            device=options.device,
            use_cache=options.use_cache,
            limit=options.limit,
            log_samples=options.log_samples,
            evaluation_tracker=tracker,
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            gen_kwargs=options.gen_kwargs,
            **dict(zip(seeds, options.seed, strict=True)),
        )
        return dict(results)

    def _model_args(self, folder: Path, spec: Any) -> dict[str, Any]:
        name = self.options.model if folder == self.folder else str(folder)
        quantization = {} if spec is None else asdict(spec)
        if spec is None and self.options.spec is not None and folder not in (self.folder, self.dense_folder):
            # The folder that was made of the model for this is named by how it was made.
            name, quantization = self.options.model, {**asdict(self.options.spec), "method": self.options.method}
        compute = self._compute(folder, spec)
        chosen = {"compute": compute, "kv_dtype": self.options.kv_dtype}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        routing = {name: value for name, value in asdict(self._routing(folder, spec)).items() if value is not None}
        return {"pretrained": name, **quantization, **chosen, **routing, "dtype": self.options.dtype}

    def _routing(self, folder: Path, spec: Any) -> RoutingOverrides:
        """What is chosen about skipped layers: nothing for the baseline, which runs as it is stored."""
        baseline = spec is None and folder == self.dense_folder
        return RoutingOverrides() if baseline else self.options.routing

    def _compute(self, folder: Path, spec: Any) -> str | None:
        """How layers multiply, None where the option makes no difference: for dense ones but in bfloat16."""
        from qtale.integrations.scoring_model import is_quantized

        concerned = spec is not None or self.options.compute == "bfloat16" or is_quantized(folder)
        return self.options.compute if concerned else None

    def _described(self, folder: Path, spec: Any) -> dict[str, Any]:
        from qtale import __version__

        return {
            "schema": SCHEMA,
            "version": __version__,
            "model": str(folder),
            "quantized_in_memory": None if spec is None else asdict(spec),
            "compute": self._compute(folder, spec),
            "routing": asdict(self._routing(folder, spec)),
            "kv_dtype": self.options.kv_dtype,
            "data": self.source.name,
        }


def _save(tracker: Any, results: dict[str, Any], samples: dict[str, Any] | None, options: EvalOptions) -> Path:
    """lm-eval's result files; it only logs a failure to write them, so what it wrote is read again."""
    tracker.save_results_aggregated(results=results, samples=samples)
    path = Path(tracker.output_path)
    folder = path.parent if path.suffix == ".json" else path
    written = [file for file in folder.rglob("*.json") if str(getattr(tracker, "date_id", "\0")) in file.name]
    try:
        json.loads(written[0].read_text(encoding="utf-8"))
    except (IndexError, OSError, ValueError) as error:
        raise Error(f"--output_path {options.output_path}: the results could not be written there.") from error
    for task, rows in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=rows)
        if not (written[0].parent / f"samples_{task}_{tracker.date_id}.jsonl").is_file():
            raise Error(f"--output_path {options.output_path}: the samples of {task} could not be written there.")
    return written[0]
