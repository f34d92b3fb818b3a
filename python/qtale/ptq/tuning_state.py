"""How far tuning has come, kept so that a killed run goes on there: the changes and what Adam remembers of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale.layerwise.journal import Journal
from qtale.ptq.solved import SolvedLayers

if TYPE_CHECKING:
    import torch

# Steps between two writings: a minute's work on a small model, against half a second to write it.
EVERY = 8
_ENTRY = "tuning"


@dataclass(frozen=True)
class TuningState:
    """Where it is kept: a file of ``layers``, named in ``journal``."""

    journal: Journal
    layers: SolvedLayers

    def restore(self, changes: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
        """Set the changes and the optimizer to what was kept, and return the losses of the steps that led there.

        Raises CheckpointError where the file is not what was written.
        """
        entry = self.journal.entries.get(_ENTRY)
        if entry is None:
            return []
        self.layers.check(entry["name"], entry["file"])
        with self.layers.reading([entry["name"]]) as kept:
            for name, change in changes.items():
                change.data.copy_(kept[name])
                prefix = f"{name}:"
                state = {key.removeprefix(prefix): kept[key] for key in kept if key.startswith(prefix)}
                optimizer.state[change].update(state)
        return list(entry["losses"])

    def keep(self, changes: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Write where tuning is after ``losses``, at every eighth step."""
        if len(losses) % EVERY:
            return
        tensors = {name: change.detach() for name, change in changes.items()}
        for name, change in changes.items():
            tensors |= {f"{name}:{key}": value for key, value in optimizer.state[change].items()}
        before = self.journal.entries.get(_ENTRY)
        name = f"tuning-{len(losses)}"
        self.journal.save(_ENTRY, {"name": name, "file": self.layers.write(name, tensors), "losses": losses})
        if before is not None:
            self.layers.path(before["name"]).unlink(missing_ok=True)
