"""``qtale.deploy``: a model that runs in the memory at hand, and changes in place when there is more or less of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.checkpoint.identity import fingerprint
from qtale.deployment.change import DeployReport, ModuleChange
from qtale.deployment.layers import bits_of, specs_of
from qtale.deployment.room import Probe, cpu_devices, room, room_to_follow
from qtale.deployment.running import Running, Specs, Step, change
from qtale.deployment.source import check_backend, check_engine_options, chosen_backend, find_source
from qtale.engine.model import LoadOptions
from qtale.errors import CheckpointError, InputError
from qtale.importance.file import Importance
from qtale.memory.devices import AUTO, Budget
from qtale.memory.needed import Needs, linear_bytes, needed
from qtale.memory.runtime import ENGINE
from qtale.memory.sizes import human_bytes
from qtale.planner.make import Planner
from qtale.planner.options import Options
from qtale.planner.plan import Plan
from qtale.planner.problem import BudgetError
from qtale.process import release, resident_bytes
from qtale.spec import check_compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qtale.engine.engine import Engine

_logger = logging.getLogger("qtale")


class Deployment:
    """A running model and the plan that it runs under; made by :func:`deploy`.

    ``plan`` is what it runs under, ``report`` what was done last. What runs is :attr:`engine` or :attr:`model`, as
    ``backend`` says. Calls of :meth:`generate` and :meth:`replan` wait for one another, so both may come from different
    threads. Streams and sessions of an engine that are open while its weights change end with InputError.
    """

    report: DeployReport
    _running: Running

    def __init__(self, planner: Planner, budget: int | str, load: LoadOptions, progress: bool, probe: Probe) -> None:
        self.planner = planner
        self.compute = load.compute
        self._load = load
        self._budget = budget
        self._progress = progress
        self._probe = probe
        self._lock = threading.RLock()
        # Those of what runs, from the load on.
        self._specs: Specs = {}
        shape = planner.source.shape
        self._shapes = {linear.name: linear for linear in (*shape.linears, *([shape.head] if shape.head else []))}

    @property
    def backend(self) -> str:
        """What runs the model: "engine" or "torch"."""
        return self.planner.backend

    @property
    def engine(self) -> Engine:
        """The engine that runs the model; InputError where PyTorch does."""
        from qtale.deployment.engine_model import EngineModel

        if not isinstance(self._running, EngineModel):
            raise InputError("deploy: PyTorch runs this model, so it has no engine; use .model.")
        return self._running.engine

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that runs; InputError where the engine does."""
        from qtale.deployment.torch_model import TorchModel

        if not isinstance(self._running, TorchModel):
            raise InputError(
                "deploy: the engine runs this model, so there is no transformers model; use .engine, or deploy with "
                "backend='torch'."
            )
        return self._running.model

    @property
    def plan(self) -> Plan:
        """The plan that the model runs under."""
        return self.report.plan

    @property
    def weights_bytes(self) -> int:
        """Bytes that the weights take now, by what they are made of."""
        return self._weights(self._specs)

    @property
    def needed_bytes(self) -> int:
        """Bytes of weights, and of KV cache and workspace (or the reserve) that the plan keeps beside them."""
        return self.weights_bytes + self.planner.reserve_bytes

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the engine or the model with the same arguments, while no change of plan is under way."""
        with self._lock:
            return self._running.generate(*args, **kwargs)

    def room(self) -> Budget:
        """The memory that the model may take now under its budget, what it holds included."""
        return room(self._budget, self.weights_bytes, self._probe)

    def room_to_follow(self) -> Budget:
        """As :meth:`room`, but where the budget is a size, no more than what is free and what the model holds."""
        return room_to_follow(self._budget, self.weights_bytes, self._probe)

    def replan(self, budget: int | str | None = None, *, plan: Plan | str | Path | None = None) -> DeployReport:
        """Follow a new budget (None: the last one, looked up again) or a given plan, in place.

        Only modules whose bits or groups change are made anew, from the weights on disk, those that shrink first (an
        engine's with those that share their product: q, k and v, gate and up); what that frees goes back to the
        system. Nothing else of the model is touched. On an error the model is as it was: BudgetError (an InputError)
        where nothing fits, InputError for a plan of another model, CheckpointError where the folder was changed or
        cannot be read, Error where the system gives no memory.
        """
        with self._lock:
            start, before = time.perf_counter(), resident_bytes()
            folder = self._reopened()
            found, chosen = self._chosen(budget, plan)
            specs = specs_of(folder, chosen)
            old = dict(self._specs)
            change(self._running, folder, specs, self._bar)
            if budget is not None:
                self._budget = budget
            return self._reported(chosen, found, old, before, start)

    def load(self, plan: Plan | str | Path | None = None) -> DeployReport:
        """Build the model; :func:`deploy` does that."""
        start, before = time.perf_counter(), resident_bytes()
        found, chosen = self._chosen(None, plan)
        specs = specs_of(self._folder, chosen)
        self._running = self._built(specs)
        self._specs = self._running.specs
        release()
        return self._reported(chosen, found, dict.fromkeys(specs), before, start)

    def __repr__(self) -> str:
        return f"Deployment({self._folder.path}, {self.backend}, weights {human_bytes(self.weights_bytes)})"

    def _built(self, specs: Specs) -> Running:
        from qtale.deployment.engine_model import EngineModel
        from qtale.deployment.torch_model import TorchModel

        if self.backend == ENGINE:
            return EngineModel(self._folder, specs, self._shapes, self._load, self._progress)
        return TorchModel(self._folder, specs, self._shapes, self.compute, self._progress)

    @property
    def _folder(self) -> ModelFolder:
        folder = self.planner.source.folder
        if folder is None:
            raise CheckpointError("deploy: a config alone cannot run; give the model's folder with its weights.")
        return folder

    def _reopened(self) -> ModelFolder:
        folder = open_folder(self._folder.path)
        if fingerprint(folder) != self.planner.source.model.fingerprint:
            raise CheckpointError(
                f"{folder.path}: its weights are no longer those that were deployed; the model stays as it is. Put the "
                "files back, or deploy anew."
            )
        return folder

    def _chosen(self, budget: int | str | None, plan: Plan | str | Path | None) -> tuple[Budget | None, Plan]:
        if plan is None:
            found = self.room() if budget is None else room(budget, self.weights_bytes, self._probe)
            _logger.info("budget: %s (%s)", human_bytes(found.num_bytes), found.source)
            return found, self.planner.for_bytes(found.num_bytes)
        if budget is not None:
            raise InputError("replan: a plan and a budget exclude each other; give one of them.")
        given = plan if isinstance(plan, Plan) else Plan.read(plan)
        self._check_room(specs_of(self._folder, given))
        return None, given

    def _check_room(self, specs: Specs) -> None:
        found, least = self.room(), self._weights(specs)
        if least > max(found.num_bytes, self.weights_bytes):
            raise BudgetError(
                least,
                found.num_bytes,
                f"deploy: the plan's weights take {human_bytes(least)} ({least} B), more than the "
                f"{human_bytes(found.num_bytes)} there are ({found.source}); give a smaller plan, or free memory.",
            )

    def _bar(self, steps: Sequence[Step]) -> Any:
        from tqdm.auto import tqdm

        return tqdm(steps, desc="replanning", unit="layer", leave=False, delay=1, disable=not self._progress)

    def _size(self, name: str, spec: Any) -> int:
        return linear_bytes(self._shapes[name], spec)

    def _weights(self, specs: Specs) -> int:
        changed = sum(self._size(name, spec) - self._shapes[name].stored_bytes for name, spec in specs.items())
        return (self._stored.weights if specs else 0) + changed

    @property
    def _stored(self) -> Needs:
        return needed(self.planner.source.shape, lambda _: None, context=0, batch=1, backend=self.backend)

    def _reported(
        self, plan: Plan, found: Budget | None, old: Specs, resident: int | None, start: float
    ) -> DeployReport:
        changes = tuple(
            ModuleChange(name, bits_of(old[name]), bits_of(spec), self._size(name, old[name]), self._size(name, spec))
            for name, spec in self._specs.items()
            if spec != old[name]
        )
        self.report = DeployReport(
            model=str(self._folder.path),
            plan=plan,
            budget_bytes=None if found is None else found.num_bytes,
            budget_source=None if found is None else found.source,
            changes=changes,
            weights_bytes=self.weights_bytes,
            stored_bytes=self._stored.weights,
            reserve_bytes=self.planner.reserve_bytes,
            resident_before=resident,
            resident_after=resident_bytes(),
            seconds=time.perf_counter() - start,
            backend=self.backend,
        )
        return self.report


def deploy(
    model: str | Path,
    budget: int | str = AUTO,
    *,
    plan: Plan | str | Path | None = None,
    importance: Importance | str | Path | None = None,
    options: Options | None = None,
    errors: str | Path | None = None,
    compute: str = "int8",
    backend: str = AUTO,
    num_threads: int | None = None,
    kv_rule: str | None = None,
    progress: bool = True,
    probe: Probe = cpu_devices,
) -> Deployment:
    """Look at the memory, plan, quantize in memory and return a running model.

    ``model`` is a dense folder or a hub name, ``budget`` bytes, a size such as "6GiB" or "auto":
    ``QTALE_MEMORY_BUDGET``, else the free main memory but for 5 %. Bits follow ``plan`` (a plan or its file), which
    must fit the budget, or are chosen under ``options``: by the scores of ``importance`` (or its file) where given,
    else by rounding errors alone, which need no data; ``errors`` is a file that keeps those between runs. ``compute``
    is "int8", "int16" or "float", as in :func:`qtale.load`. ``backend`` is "engine" (C++), "torch", or "auto": the
    engine where it runs the model; ``num_threads`` and ``kv_rule`` are the engine's, as in :func:`qtale.load`.
    Memory is kept for the context and batch of the options, which do not bound what is asked of the model later. One
    tensor is read at a time; layers at 16 bits stay in the stored dtype. ``probe`` replaces the look at the memory.

    Raises BudgetError (an InputError) where nothing fits, naming the least budget that would; InputError for wrong
    values and for a plan or scores of another model; CheckpointError and UnsupportedError for models that cannot run.
    """
    check_backend(backend)
    check_compute("deploy", compute)
    load = LoadOptions(compute, kv_rule=kv_rule, num_threads=num_threads)
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.read(plan)
    if options is None:
        options = Options() if plan is None else Options.of_plan(plan)
    source = find_source(model, importance)
    runs_on = chosen_backend(backend, source)
    check_engine_options(runs_on, num_threads=num_threads, kv_rule=kv_rule)
    planner = Planner(source, options.resolved(), errors, progress, runs_on)
    deployment = Deployment(planner, budget, load, progress, probe)
    deployment.load(plan)
    return deployment
