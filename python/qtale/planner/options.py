"""What a user can ask of a plan, with the defaults of each mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qtale.errors import InputError
from qtale.planner.fields import BITS, MODES
from qtale.planner.plan import Plan
from qtale.planner.solve import PAPER_BITS
from qtale.spec import QuantSpec

GRANULARITIES = ("layer", "module")
DEFAULT_CHOICES = (16, 8, 4, 3)
AUTO = "auto"
# What the budgets of the paper's Table IV leave beside the weights of Llama-2-7B lies between 0.33 and 0.40 GiB.
PAPER_RESERVE = int(0.36 * 2**30)


@dataclass(frozen=True)
class Options:
    """How bits are chosen. None takes the mode's default: see :meth:`resolved`.

    ``metric`` is a score of importance.json, ``none``, ``auto`` (the first that it has, in the order in which plans by
    them measured) or ``best``: plans by the first four of them are run on calibration sequences, which takes as long as
    five forward passes, and the one whose predictions lie nearest to the dense model's is taken.
    ``choices`` are the bits that a layer or module may get, ``head_bits`` those of an untied lm_head or ``auto`` to
    let the solver choose, ``reserve`` the bytes to keep beside the weights instead of KV cache and workspace.
    """

    mode: str = "knapsack"
    metric: str = AUTO
    choices: Sequence[int] | None = None
    granularity: str | None = None
    head_bits: int | str = 16
    group_size: int | str | None = None
    symmetric: bool = True
    context: int = 2048
    batch: int = 1
    reserve: int | None = None

    @classmethod
    def of_plan(cls, plan: Plan) -> Options:
        """Options under which later plans of a model have groups, head and context of a first one."""
        options = cls(mode=plan.mode, group_size=plan.group_size, symmetric=plan.symmetric, head_bits=plan.lm_head_bits)
        if plan.context is None or plan.batch is None:
            return options
        return dataclasses.replace(options, context=plan.context, batch=plan.batch)

    def resolved(self) -> Options:
        """These options with every default in place, checked; raises InputError naming what is accepted.

        Mode ``paper`` takes 16, 8 and 4 bits, layers, one scale per channel and a reserve of 0.36 GiB; the others
        16, 8, 4 and 3 bits, modules (``uniform``: layers) and automatic groups.
        """
        if self.mode not in MODES:
            raise InputError(f"plan: mode {self.mode!r} is not known; use {', '.join(MODES)}.")
        is_paper = self.mode == "paper"
        by_layer = self.mode in ("paper", "uniform")
        choices = (PAPER_BITS if is_paper else DEFAULT_CHOICES) if self.choices is None else self.choices
        found = Options(
            mode=self.mode,
            metric=self.metric,
            choices=tuple(sorted(set(choices), reverse=True)),
            granularity=self.granularity or ("layer" if by_layer else "module"),
            head_bits=self.head_bits,
            group_size=("channel" if is_paper else AUTO) if self.group_size is None else self.group_size,
            symmetric=self.symmetric,
            context=self.context,
            batch=self.batch,
            reserve=PAPER_RESERVE if is_paper and self.reserve is None else self.reserve,
        )
        found._check()
        return found

    def spec(self, bits: int) -> QuantSpec | None:
        """The spec of a module with these bits; None at 16, which leave it as stored."""
        return (
            None
            if bits == 16
            else QuantSpec(bits, AUTO if self.group_size is None else self.group_size, self.symmetric)
        )

    def _check(self) -> None:
        wrong = [bits for bits in self.choices or () if bits not in BITS]
        if wrong or not self.choices:
            asked = repr(wrong[0]) if wrong else "no"
            raise InputError(f"plan: {asked} bits cannot be chosen; use any of {', '.join(map(str, BITS))}.")
        if self.granularity not in GRANULARITIES:
            raise InputError(f"plan: granularity {self.granularity!r} is not known; use 'layer' or 'module'.")
        if self.mode == "paper" and (self.choices != PAPER_BITS or self.granularity != "layer"):
            raise InputError(
                "plan: mode paper gives whole layers 16, 8 or 4 bits; use mode knapsack for other choices."
            )
        if self.head_bits != AUTO and self.head_bits not in BITS:
            raise InputError(f"plan: head bits {self.head_bits!r}; use {', '.join(map(str, BITS))} or 'auto'.")
        if self.head_bits == AUTO and self.mode not in ("greedy", "knapsack"):
            raise InputError(f"plan: mode {self.mode} does not choose bits for the head; give them, or use knapsack.")
        if self.context < 0 or self.batch < 1:
            raise InputError(f"plan: context {self.context} and batch {self.batch}; at least 0 and 1 are needed.")
        if self.reserve is not None and self.reserve < 0:
            raise InputError(f"plan: reserve {self.reserve} is negative; give bytes or a size such as 300MiB.")
        self.spec(8)
