"""What a deployment did: the report of a first load and of every change after it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qtale.memory.sizes import human_bytes
from qtale.planner.plan import Plan


@dataclass(frozen=True)
class ModuleChange:
    """One Linear: bits and bytes of its weight before and after; 16 bits are the weight as stored."""

    name: str
    bits_before: int
    bits_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class DeployReport:
    """What a load or a change of plan did; sizes in bytes.

    ``changes`` are in model order, a first load counting from the weights as stored. ``weights_bytes`` is what all
    weights take now, ``stored_bytes`` what they would take as stored, ``reserve_bytes`` is what the plan keeps beside
    them; ``backend`` ("engine" or "torch") is what runs them. ``budget_bytes`` and its ``budget_source`` are None where
    a plan was given. Resident sizes are those of the whole process, None where the system does not tell.
    """

    model: str
    plan: Plan
    budget_bytes: int | None
    budget_source: str | None
    changes: tuple[ModuleChange, ...]
    weights_bytes: int
    stored_bytes: int
    reserve_bytes: int
    resident_before: int | None
    resident_after: int | None
    seconds: float
    backend: str

    @property
    def bytes_freed(self) -> int:
        """Bytes of weights that the changes gave back; negative where they took more."""
        return sum(change.bytes_before - change.bytes_after for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields, with ``bytes_freed``."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes = [dataclasses.asdict(change) for change in self.changes]
        return {**value, "plan": self.plan.to_json(), "changes": changes, "bytes_freed": self.bytes_freed}

    def __str__(self) -> str:
        if not self.changes:
            return f"no layer changed; weights take {human_bytes(self.weights_bytes)}"
        counts = Counter((change.bits_before, change.bits_after) for change in self.changes)
        steps = ", ".join(f"{count} from {old} to {new} bits" for (old, new), count in sorted(counts.items()))
        moved = f"{human_bytes(abs(self.bytes_freed))} {'freed' if self.bytes_freed >= 0 else 'taken'}"
        return f"{steps}; {moved}, weights take {human_bytes(self.weights_bytes)}; {self.seconds:.1f} s"
