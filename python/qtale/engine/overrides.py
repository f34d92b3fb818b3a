"""What is chosen about a model's skipped layers: checked before weights are read, and applied."""

from __future__ import annotations

from pathlib import Path

from qtale.checkpoint.folder import open_folder
from qtale.engine.engine import Engine
from qtale.engine.spec import read_spec
from qtale.errors import UnsupportedError
from qtale.routing import RoutingOverrides, depth_mask, read_routing


def check_overrides(overrides: RoutingOverrides, path: Path) -> None:
    """Raises as :meth:`RoutingOverrides.check`, and for no layers, from the folder's files.

    Nothing is said of models that the engine does not run: loading refuses them.
    """
    if overrides == RoutingOverrides():
        return
    folder = open_folder(path)
    try:
        spec = read_spec(folder.config, str(folder.path))
    except UnsupportedError:
        return
    routing = read_routing(folder.path, spec.num_layers, spec.hidden_size)
    overrides.check(routing.routers if routing else (), str(folder.path))
    depth_mask(overrides.layers, spec.num_layers)


def apply_overrides(overrides: RoutingOverrides, engine: Engine) -> None:
    """Run an engine that was loaded with their ``kv_rule`` by the others; raises as :func:`check_overrides`."""
    overrides.check(engine.routed_layers, str(engine.path))
    if overrides.theta is not None:
        engine.theta = overrides.theta
    if overrides.layers is not None:
        engine.set_depth(overrides.layers)
