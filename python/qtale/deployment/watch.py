"""Following the free memory: a deployment shrinks when its plan no longer fits and grows when more would stay free."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qtale.deployment.change import DeployReport
from qtale.deployment.deploy import Deployment
from qtale.errors import Error, InputError
from qtale.memory.devices import Budget
from qtale.memory.sizes import human_bytes
from qtale.planner.plan import Plan
from qtale.planner.problem import BudgetError

_logger = logging.getLogger("qtale")
POLL_SECONDS = 5.0
MARGIN = 0.05
PATIENCE = 3


class Watcher:
    """Decides, one look at a time, whether a deployment should change.

    It shrinks at once when the plan no longer fits the room there is, to a plan that leaves ``margin`` of the room; it
    grows only after ``patience`` looks in a row that leave room, beside that margin, for weights larger by ``margin``.
    So no swing of the free memory within the margin changes anything. ``look`` replaces
    :meth:`Deployment.room_to_follow`.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        look: Callable[[], Budget] | None = None,
        margin: float = MARGIN,
        patience: int = PATIENCE,
    ) -> None:
        if not 0 <= margin < 1 or patience < 1:
            raise InputError(
                f"watch: margin {margin!r} and patience {patience!r}; a share from 0 to below 1 and 1 or more looks "
                "are needed."
            )
        self._deployment = deployment
        self._look = look or deployment.room_to_follow
        self._margin = margin
        self._patience = patience
        self._streak = 0
        self._told: str | None = None

    def step(self) -> DeployReport | None:
        """Look once; the report of the change that it led to, None for no change.

        A change that fails is logged, the model goes on as it was, and the next looks try again.
        """
        found = self._look()
        spare = int(found.num_bytes * (1 - self._margin))
        fits = self._deployment.needed_bytes <= found.num_bytes
        plan = self._larger(spare) if fits else self._smaller(spare, found)
        if plan is None:
            return None
        self._streak = 0
        try:
            report = self._deployment.replan(plan=plan)
        except Error as error:
            self._tell(f"the model was not changed: {error}")
            return None
        _logger.info("%s, room for %s: %s", found.source, human_bytes(found.num_bytes), report)
        return report

    def _smaller(self, spare: int, found: Budget) -> Plan | None:
        self._streak = 0
        planner = self._deployment.planner
        try:
            plan = planner.for_bytes(spare)
        except BudgetError as error:
            plan = planner.for_bytes(error.least)
            self._tell(f"{found.source}: the model runs as small as it gets. {error}")
        return plan if self._gain(plan) < 0 else None

    def _larger(self, spare: int) -> Plan | None:
        least_gain = int(self._margin * self._deployment.report.stored_bytes)
        plan = None
        if spare - self._deployment.needed_bytes >= least_gain:
            plan = self._deployment.planner.for_bytes(spare)
        if plan is None or self._gain(plan) < max(1, least_gain):
            self._streak = 0
            return None
        self._streak += 1
        return plan if self._streak >= self._patience else None

    def _gain(self, plan: Plan) -> int:
        return plan.needed_bytes - self._deployment.needed_bytes

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            _logger.warning("%s", text)


def watch(
    deployment: Deployment,
    *,
    interval: float = POLL_SECONDS,
    look: Callable[[], Budget] | None = None,
    margin: float = MARGIN,
    patience: int = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
    changed: Callable[[DeployReport], None] | None = None,
) -> None:
    """Look every ``interval`` seconds and change the deployment as :class:`Watcher` decides, until interrupted.

    Each change is logged and handed to ``changed``. May run in a thread of its own beside ``deployment.generate``.
    Raises KeyboardInterrupt on Ctrl-C, InputError for wrong values, and what ``look`` raises.
    """
    if not interval > 0:
        raise InputError(f"watch: interval {interval!r} must be more than 0 seconds.")
    watcher = Watcher(deployment, look=look, margin=margin, patience=patience)
    while True:
        report = watcher.step()
        if report is not None and changed is not None:
            changed(report)
        sleep(interval)
