"""qtale.json and router.safetensors: what is written is read again, and what is broken is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import qtale
from eval_samples import tiny_llama
from qtale.errors import CheckpointError, InputError
from qtale.integrations.routing import attach_routing, router_module, router_weights
from qtale.nn import RoutedLayer, Router
from qtale.routing import RouterWeights, Routing, read_routing, write_routing

LAYERS, HIDDEN = 4, 24
METADATA = {"format": "qtale.router", "version": "1"}


def sample(width: int | None = 6, seed: int = 0) -> RouterWeights:
    torch.manual_seed(seed)
    return router_weights(Router(HIDDEN, width, norm_eps=1e-5))


def equal(one: RouterWeights, other: RouterWeights) -> bool:
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    routing = Routing({1: sample(6), 3: sample(None)}, theta=0.25, forced_tokens=3, kv_rule="keep")
    one_linear = Routing({2: RouterWeights(np.ones((1, HIDDEN), np.float32))})
    routing = Routing({**routing.routers, 3: sample(9)}, 0.25, 3, "keep")
    for written in (routing, one_linear, Routing()):
        write_routing(tmp_path, written, LAYERS, HIDDEN)
        found = read_routing(tmp_path, LAYERS, HIDDEN)
        assert found is not None
        assert (found.theta, found.forced_tokens, found.kv_rule) == (
            written.theta,
            written.forced_tokens,
            written.kv_rule,
        )
        assert found.routers.keys() == written.routers.keys()
        assert all(equal(found.routers[layer], written.routers[layer]) for layer in written.routers)
    assert read_routing(tmp_path / "..", LAYERS, HIDDEN) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qtale.json", "router.safetensors"]


def test_a_router_module_computes_what_its_formula_says() -> None:
    weights = sample()
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    h = x.double().numpy() @ weights.w1.astype(np.float64).T + weights.bias1
    h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + weights.norm_eps) * weights.norm
    logits = (h / (1 + np.exp(-h))) @ weights.w2.astype(np.float64).T + weights.bias2
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    found = router_module(weights)(x).detach().numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert equal(router_weights(router_module(weights)), weights)


def change(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value["routing"] = {**value["routing"], **changes}
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 1.5}, "theta is 1.5"),
        ({"theta": "x"}, "must be a number"),
        ({"forced_tokens": -1}, "forced_tokens is -1"),
        ({"forced_tokens": 2**63}, "use 0 to 2147483647"),
        ({"kv_rule": "drop"}, "kv_rule is 'drop'"),
        ({"layers": [1, 4]}, "layers.4.w1 is missing"),
        ({"layers": [1, 1]}, "ascending order"),
        ({"layers": []}, None),
        ({"more": 1}, "exactly"),
    ],
)
def test_broken_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    write_routing(tmp_path, Routing({1: sample()}), LAYERS, HIDDEN)
    change(tmp_path / "qtale.json", **changes)
    if message is None:
        assert read_routing(tmp_path, LAYERS, HIDDEN) == Routing()
        return
    with pytest.raises(CheckpointError, match=message):
        read_routing(tmp_path, LAYERS, HIDDEN)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    write_routing(tmp_path, Routing({1: sample()}), LAYERS, HIDDEN)
    for sizes, message in (((1, HIDDEN), "routes layer 1"), ((LAYERS, HIDDEN + 1), "w1 has shape")):
        with pytest.raises(CheckpointError, match=message):
            read_routing(tmp_path, *sizes)
    path = tmp_path / "router.safetensors"
    good = load_file(path)
    for tensors, message in (
        ({**good, "layers.2.w1": good["layers.1.w1"]}, "does not name"),
        ({**good, "layers.1.w1": good["layers.1.w1"].astype(np.float16)}, "is F16"),
        ({**good, "layers.1.bias2": np.full(2, np.nan, np.float32)}, "NaN"),
        ({**good, "layers.1.bias2": np.zeros(3, np.float32)}, "bias2 has shape"),
        ({name: value for name, value in good.items() if name != "layers.1.w1"}, "w1 is missing"),
    ):
        save_file(tensors, path, METADATA)
        with pytest.raises(CheckpointError, match=message):
            read_routing(tmp_path, LAYERS, HIDDEN)
    (tmp_path / "qtale.json").write_text('{"format": "qtale.model", "version": 2}')
    with pytest.raises(CheckpointError, match="version 2"):
        read_routing(tmp_path, LAYERS, HIDDEN)
    (tmp_path / "qtale.json").unlink()
    with pytest.raises(CheckpointError, match=r"no qtale\.json"):
        read_routing(tmp_path, LAYERS, HIDDEN)
    with pytest.raises(InputError, match="routes layer 9"):
        write_routing(tmp_path, Routing({9: sample()}), LAYERS, HIDDEN)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has format None; expected 'qtale.router'"),
        ({"format": "pt"}, "has format 'pt'; expected 'qtale.router'"),
        ({"format": "qtale.router"}, "has version None; this qtale reads version '1'"),
        ({"format": "qtale.router", "version": "2"}, "has version '2'; this qtale reads version '1'"),
    ],
)
def test_routers_of_another_format_or_version_are_refused(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    write_routing(tmp_path, Routing({1: sample()}), LAYERS, HIDDEN)
    path = tmp_path / "router.safetensors"
    save_file(load_file(path), path, METADATA)
    assert read_routing(tmp_path, LAYERS, HIDDEN) is not None
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match=f"router.safetensors: {message}"):
        read_routing(tmp_path, LAYERS, HIDDEN)


def reference(model: Any, ids: torch.Tensor, decisions: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits where each routed layer is the plain layer over the tokens that execute it, one sequence at a time."""
    rows = []
    for row in range(len(ids)):
        inner = model.model
        x = inner.embed_tokens(ids[row : row + 1])
        positions = torch.arange(ids.shape[1])[None]
        for index, layer in enumerate(inner.layers):
            plain = layer.layer if isinstance(layer, RoutedLayer) else layer
            kept = decisions[index][row] if index in decisions else torch.ones(ids.shape[1], dtype=torch.bool)
            part, places = x[:, kept], positions[:, kept]
            mask = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()[None, None]
            if part.shape[1]:
                x = x.clone()
                x[:, kept] = plain(
                    part,
                    attention_mask=mask,
                    position_ids=places,
                    position_embeddings=inner.rotary_emb(part, position_ids=places),
                )
        rows.append(model.lm_head(inner.norm(x)))
    return torch.cat(rows)


@pytest.mark.parametrize("theta", [0.0, 0.4, 0.5, 0.55, 1.0])
def test_the_dense_form_is_the_compacted_one(tmp_path: Path, theta: float) -> None:
    model = tiny_llama(num_hidden_layers=LAYERS, hidden_size=HIDDEN * 4).eval()
    torch.manual_seed(2)
    router = Router(HIDDEN * 4, 5)
    with torch.no_grad():
        router.last.weight.mul_(4)
        router.last.bias.zero_()
    weights = router_weights(router)
    wrapped = attach_routing(model, Routing({1: weights, 2: weights}, theta=theta, forced_tokens=1))
    ids = torch.randint(0, 250, (3, 17))
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
        decisions = {index: layer.executed for index, layer in zip((1, 2), wrapped, strict=True)}
        expected = reference(model, ids, decisions)
        assert all(bool(layer.executed[:, 0].all()) for layer in wrapped)
        share = float(decisions[1].float().mean())
        assert share == pytest.approx({0.0: 1.0, 1.0: 3 / 51}.get(theta, share))
        assert 0.06 < share < 0.98 or theta in (0.0, 1.0)
        assert (found - expected).abs().max() < 1e-5 * found.abs().max() + 1e-5
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
        together = torch.cat([first.logits, rest.logits], dim=1)
    assert (together - found).abs().max() < 1e-4


def test_load_torch_takes_the_routers_along(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=96)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    write_routing(tmp_path, Routing({1: router_weights(Router(96, 4))}, theta=0.9), 2, 96)
    loaded = qtale.load_torch(tmp_path)
    assert isinstance(loaded.model.layers[1], RoutedLayer)
    assert loaded.model.layers[1].theta == 0.9
