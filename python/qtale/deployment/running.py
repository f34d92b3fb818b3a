"""A model that runs, whichever way: what a deployment asks of it, and how its weights are changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from qtale.checkpoint.folder import ModelFolder
from qtale.errors import CheckpointError
from qtale.process import release
from qtale.spec import ResolvedSpec

Specs = Mapping[str, ResolvedSpec | None]
# Freed memory goes back to the system whenever this much was read.
_RELEASE_BYTES = 8 << 20


class Step(NamedTuple):
    """Linears that change together; ``put`` makes them anew, or raises and leaves them as they were.

    ``growth`` is the bytes that their weights take more than before, ``stored`` those that are read from disk.
    """

    modules: tuple[str, ...]
    growth: int
    stored: int
    put: Callable[[], None]


# The steps from what runs now to what specs say.
StepsTo = Callable[[Specs], Sequence[Step]]


class Running(Protocol):
    """A model that runs, ``specs`` saying how each Linear is rounded now; ``backend`` is "engine" or "torch"."""

    specs: dict[str, ResolvedSpec | None]

    @property
    def backend(self) -> str: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def changing(self, folder: ModelFolder) -> AbstractContextManager[StepsTo]:
        """While this lasts, weights of the folder may take the place of those that run."""


def change(running: Running, folder: ModelFolder, specs: Specs, bar: Callable[[Sequence[Step]], Any]) -> None:
    """Make all that differs anew, what shrinks first; on an error what was done is taken back.

    ``bar`` shows the progress over the steps. Raises CheckpointError for weights that cannot be read or rounded.
    """
    old = dict(running.specs)
    with running.changing(folder) as steps_to:
        try:
            _run(bar(_ordered(steps_to(specs))))
        except BaseException as error:
            _take_back(running, steps_to, old, error)
            raise
        finally:
            release()


def _ordered(steps: Sequence[Step]) -> list[Step]:
    return sorted(steps, key=lambda step: step.growth)


def _run(steps: Sequence[Step]) -> None:
    handled = 0
    for step in steps:
        step.put()
        handled += step.stored
        # What small pieces leave behind would otherwise pile up until the end.
        if handled >= _RELEASE_BYTES:
            handled = 0
            release()


def _take_back(running: Running, steps_to: StepsTo, old: Specs, cause: BaseException) -> None:
    for step in _ordered(steps_to(old)):
        try:
            step.put()
        # Whatever hinders one step must not keep the others from going back.
        except Exception:
            continue
    stuck = [name for name, spec in running.specs.items() if spec != old[name]]
    if stuck:
        raise CheckpointError(
            f"{cause} The change could not be taken back in {len(stuck)} modules, {stuck[0]} the first, which keep the "
            "bits they got; the model still runs. Deploy anew when the files are readable."
        ) from cause
