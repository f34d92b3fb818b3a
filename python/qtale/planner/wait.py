"""Waiting for memory: an attempt is made again and again until it fits or the time is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from qtale.errors import InputError
from qtale.planner.problem import BudgetError

_logger = logging.getLogger("qtale")
T = TypeVar("T")
POLL_SECONDS = 5.0


def wait_until_it_fits(
    attempt: Callable[[], T],
    *,
    timeout: float | None = None,
    interval: float = POLL_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of ``attempt``, tried every ``interval`` seconds for as long as it raises BudgetError.

    Raises the last BudgetError once ``timeout`` seconds have passed (None waits on), saying how long was waited.
    """
    if timeout is not None and not timeout >= 0:
        raise InputError(f"plan: timeout {timeout!r} must be a number of seconds, 0 or more.")
    start = clock()
    told: str | None = None
    while True:
        try:
            return attempt()
        except BudgetError as error:
            waited = clock() - start
            if timeout is not None and waited >= timeout:
                raise BudgetError(error.least, error.budget, f"{error} Waited {waited:.0f} s.") from error
            if str(error) != told:
                told = str(error)
                _logger.info("waiting for memory: %s", told)
            sleep(interval if timeout is None else min(interval, timeout - waited))
