"""Routers into models of transformers, and out of them again."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qtale.errors import UnsupportedError
from qtale.routing import KEEP, RouterWeights, Routing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qtale.nn import RoutedLayer, Router


def attach_routing(model: PreTrainedModel, routing: Routing) -> list[RoutedLayer]:
    """Wrap the routed decoder layers of a model in place; returns the wrappers, in the order of layers.

    Raises InputError where the routing does not fit the model, UnsupportedError for models without numbered layers.
    """
    from qtale.nn import RoutedLayer

    layers = decoder_layers(model)
    routing.check(len(layers), model.config.hidden_size, type(model).__name__)
    wrapped = []
    for index, weights in sorted(routing.routers.items()):
        layers[index] = RoutedLayer(
            layers[index],
            router_module(weights),
            theta=routing.theta,
            forced_tokens=routing.forced_tokens,
            keep_skipped=routing.kv_rule == KEEP,
        )
        wrapped.append(layers[index])
    return wrapped


def set_depth(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Make all decoder layers that are not in ``layers`` skip every token, in place (a static plan)."""
    from qtale.nn import RoutedLayer

    all_layers = decoder_layers(model)
    for index in range(len(all_layers)):
        if index not in layers:
            all_layers[index] = RoutedLayer(all_layers[index], None, runs=False)


def decoder_layers(model: PreTrainedModel) -> Any:
    """The ModuleList of decoder layers; raises UnsupportedError where a model keeps them elsewhere."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedError(f"{type(model).__name__}: has no model.layers, which routing wraps.")
    return layers


def router_module(weights: RouterWeights) -> Router:
    """A trainable router with these weights."""
    import torch
    from torch import nn

    from qtale.nn import Router

    router = Router(weights.w1.shape[1], None if weights.w2 is None else weights.w1.shape[0], norm_eps=weights.norm_eps)

    def fill(parameter: torch.Tensor, value: Any, otherwise: float) -> None:
        with torch.no_grad():
            parameter.fill_(otherwise) if value is None else parameter.copy_(torch.tensor(value))

    fill(router.first.weight, weights.w1, 0.0)
    fill(router.first.bias, weights.bias1, 0.0)
    if isinstance(router.last, nn.Linear):
        fill(router.last.weight, weights.w2, 0.0)
        fill(router.last.bias, weights.bias2, 0.0)
        if weights.norm is None:
            router.norm = nn.Identity()
        elif isinstance(router.norm, nn.RMSNorm):
            fill(router.norm.weight, weights.norm, 1.0)
    return router


def router_weights(router: Router) -> RouterWeights:
    """The weights of a router as arrays."""
    from torch import nn

    def array(value: Any) -> Any:
        return None if value is None else value.detach().float().cpu().numpy().copy()

    norm = router.norm if isinstance(router.norm, nn.RMSNorm) else None
    return RouterWeights(
        w1=array(router.first.weight),
        bias1=array(router.first.bias),
        norm=array(norm.weight) if norm is not None else None,
        w2=array(router.last.weight) if router.last is not None else None,
        bias2=array(router.last.bias) if router.last is not None else None,
        norm_eps=float(norm.eps or 0.0) if norm is not None else RouterWeights.norm_eps,
    )
