"""Of several plans the one that moves the model's predictions least, found by running them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qtale.errors import InputError
from qtale.planner.plan import Plan
from qtale.planner.source import Source

_logger = logging.getLogger("qtale")


def least_divergent(source: Source, plans: Sequence[Plan], *, progress: bool = True) -> Plan:
    """The plan whose predictions on the calibration sequences of importance.json lie nearest to the dense model's.

    Losses of modules do not add up where rounding is coarse, so what a score predicts for a whole plan may be far off;
    this runs every plan. Raises InputError where importance.json keeps no tokens or the weights are not there.
    """
    by_bits: dict[str, Plan] = {}
    for plan in plans:
        by_bits.setdefault(str((plan.layers, plan.lm_head_bits)), plan)
    distinct = list(by_bits.values())
    if len(distinct) == 1:
        return distinct[0]
    tokens = () if source.importance is None else source.importance.tokens
    if not tokens or source.folder is None:
        raise InputError(
            "plan: metric best runs plans on the calibration tokens that importance.json keeps; this one has none, so "
            "measure again, or name a metric."
        )
    import numpy as np

    from qtale.importance.trial import divergences

    found = divergences(source.folder, np.array(tokens, np.int64), [one.spec_of for one in distinct], progress=progress)
    for plan, nats in zip(distinct, found, strict=True):
        _logger.info("plan by %s: predictions diverge by %.4f nats per token", plan.metric, nats)
    return distinct[min(range(len(distinct)), key=lambda place: found[place])]
