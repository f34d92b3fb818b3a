"""Routed execution in the engine against the dense masked form in torch: same decisions, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtale
from engine_samples import forced_logits
from eval_samples import tiny_llama
from qtale import _core
from qtale.checkpoint.folder import open_folder
from qtale.engine import Engine
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadedModel, LoadOptions
from qtale.errors import CheckpointError, InputError
from qtale.integrations.routing import router_weights, set_depth
from qtale.nn import RoutedLayer, Router
from qtale.routing import Routing, write_routing
from qtale.spec import QuantSpec

LAYERS, HIDDEN, VOCAB = 4, 64, 257
ROUTED = (1, 2, 3)
# Largest difference of a logit, as a share of the range of logits.
BOUND = 1e-5
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def router(width: int | None, seed: int, bias: float) -> Router:
    """A router that spreads its decisions; ``bias`` moves the share of tokens that execute."""
    torch.manual_seed(seed)
    made = Router(HIDDEN, width)
    with torch.no_grad():
        if made.last is not None:
            made.last.weight.mul_(4)
            made.last.bias.copy_(torch.tensor([0.0, bias]))
        else:
            made.first.weight.mul_(4)
            made.first.bias.fill_(bias)
    return made


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    tiny_llama(num_hidden_layers=LAYERS, hidden_size=HIDDEN).save_pretrained(folder)
    return folder


def routed(dense: Path, folder: Path, kv_rule: str = "evict", bias: float = 0.0, forced_tokens: int = 2) -> Path:
    """The model with routers of both kinds beside it."""
    folder.mkdir(exist_ok=True)
    for file in dense.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    widths: dict[int, int | None] = {1: 12, 2: None, 3: 5}
    routers = {layer: router_weights(router(widths[layer], layer, bias)) for layer in ROUTED}
    write_routing(folder, Routing(routers, 0.5, forced_tokens, kv_rule), LAYERS, HIDDEN)
    return folder


def prompts(count: int = 5) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB, length).tolist() for length in (33, 1, 70, 12, 5)[:count]]


def oracle_logits(model: torch.nn.Module, tokens: list[int]) -> tuple[np.ndarray, dict[int, int]]:
    """Logits of the dense form, and how many tokens executed each layer."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    executed = {index: len(tokens) for index in range(LAYERS)}
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer, RoutedLayer):
            executed[index] = int(layer.executed.sum())
    return logits, executed


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < BOUND * np.ptp(expected))


def set_theta(engine: Engine, model: torch.nn.Module, theta: float) -> None:
    engine.theta = theta
    for layer in model.model.layers:
        if isinstance(layer, RoutedLayer):
            layer.theta = theta


def theta_for(model: torch.nn.Module, ratio: float) -> float:
    """The threshold at which about this share of decisions is to execute."""
    seen: list[torch.Tensor] = []
    layers = [layer for layer in model.model.layers if isinstance(layer, RoutedLayer)]
    hooks = [layer.router.register_forward_hook(lambda module, args, out: seen.append(out)) for layer in layers]
    with torch.no_grad():
        for tokens in prompts():
            model(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    if ratio in (0.0, 1.0):
        return 1.0 - ratio
    values = torch.cat([value.flatten() for value in seen]).sort().values
    middle = int(len(values) * (1 - ratio))
    near = values[middle - 9 : middle + 9]
    # In the middle of a gap, where rounding decides nothing.
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kv_rule", ["evict", "keep"])
def test_logits_and_decisions_are_those_of_the_dense_form(
    dense: Path, tmp_path: Path, ratio: float, kv_rule: str
) -> None:
    folder = routed(dense, tmp_path / "model", kv_rule)
    model = qtale.load_torch(folder)
    with qtale.load(folder, progress=False) as engine:
        set_theta(engine, model, theta_for(model, ratio))
        shares = []
        for tokens in prompts():
            expected, executed = oracle_logits(model, tokens)
            assert close(engine.logits(tokens), expected)
            assert engine.report.executed == [executed[layer] for layer in range(LAYERS)]
            shares += [executed[layer] / len(tokens) for layer in ROUTED] if len(tokens) > 20 else []
    assert abs(np.mean(shares) - ratio) < 0.2


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kv_rule", ["evict", "keep"])
def test_batches_chunks_and_decoding_give_the_logits_of_the_dense_form(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, kv_rule: str
) -> None:
    folder, steps = routed(dense, tmp_path / "model", kv_rule), 4
    model = qtale.load_torch(folder)
    with qtale.load(folder, progress=False) as engine:
        set_theta(engine, model, theta_for(model, ratio))
        oracle = [oracle_logits(model, tokens) for tokens in prompts()]
        whole = [engine.logits(tokens) for tokens in prompts()]
        cut = [tokens for tokens in prompts() if len(tokens) > steps]
        # The last token of a text is only chosen and does not run.
        executed = [oracle_logits(model, tokens[:-1])[1] for tokens in cut]
        counts = [sum(each[layer] for each in executed) for layer in range(LAYERS)]
        for pass_tokens in (512, 16):
            monkeypatch.setattr("qtale.engine.engine.PASS_TOKENS", pass_tokens)
            monkeypatch.setattr("qtale.engine.generate.PASS_TOKENS", pass_tokens)
            for tokens, expected, (exact, _) in zip(prompts(), whole, oracle, strict=True):
                found = engine.logits(tokens)
                assert np.array_equal(found, expected)
                assert close(found, exact)
            starts, ends = [tokens[:-steps] for tokens in cut], [tokens[-steps:] for tokens in cut]
            decoded = forced_logits(engine, monkeypatch, starts, ends)
            assert engine.report.executed == counts
            for tokens, rows in zip(cut, decoded, strict=True):
                exact, _ = oracle[prompts().index(tokens)]
                assert close(rows, exact[-steps - 1 : -1])
                alone = forced_logits(engine, monkeypatch, [tokens[:-steps]], [tokens[-steps:]])
                assert np.array_equal(alone[0], rows)


def test_batches_decode_to_what_the_dense_form_finds_likeliest(dense: Path, tmp_path: Path) -> None:
    folder = routed(dense, tmp_path / "model")
    model = qtale.load_torch(folder)
    with qtale.load(folder, progress=False) as engine:
        generated = engine.generate(prompts(), 20, ignore_end=True)
        for tokens, generation in zip(prompts(), generated, strict=True):
            assert engine.generate(tokens, 20, ignore_end=True).tokens == generation.tokens
            expected, _ = oracle_logits(model, tokens + list(generation.tokens))
            assert expected[len(tokens) - 1 : -1].argmax(axis=1).tolist() == list(generation.tokens)


def test_int8_routes_alike_however_tokens_come_and_nearly_as_float_does(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Routers of quantized layers may round what they multiply.
    folder = routed(dense, tmp_path / "model")
    with qtale.load(folder, bits=8, compute="int8", progress=False) as engine:
        whole, executed = [], []
        for tokens in prompts():
            whole.append(engine.logits(tokens))
            executed.append(engine.report.executed)
        generated = engine.generate(prompts(), 20, ignore_end=True)
        for tokens, generation in zip(prompts(), generated, strict=True):
            assert engine.generate(tokens, 20, ignore_end=True).tokens == generation.tokens
        monkeypatch.setattr("qtale.engine.engine.PASS_TOKENS", 16)
        for tokens, expected, counts in zip(prompts(), whole, executed, strict=True):
            assert np.array_equal(engine.logits(tokens), expected)
            assert engine.report.executed == counts
    with qtale.load(folder, bits=8, compute="float", progress=False) as engine:
        changed = 0
        for tokens, counts in zip(prompts(), executed, strict=True):
            engine.logits(tokens)
            changed += int(np.abs(np.subtract(engine.report.executed, counts)).sum())
        assert changed <= sum(map(len, prompts())) * len(ROUTED) // 20


@pytest.mark.skipif("avx512_bf16" not in _core.cpu_isas(), reason="needs AVX-512 BF16")
def test_a_decoder_routes_as_the_kernels_in_use_do(dense: Path, tmp_path: Path) -> None:
    folder, best = routed(dense, tmp_path / "model"), _core.cpu_isa()

    def decisions(load_with: str, run_with: str) -> list[Any]:
        _core.set_cpu_isa(load_with)
        with qtale.load(folder, bits=8, progress=False, kv_dtype="float16") as engine:
            _core.set_cpu_isa(run_with)
            return [(engine.logits(tokens).tolist(), engine.report.executed) for tokens in prompts()]

    try:
        assert decisions("avx512_bf16", "avx512") == decisions("avx512", "avx512")
        assert decisions("avx512", "avx512_bf16") == decisions("avx512_bf16", "avx512_bf16")
    finally:
        _core.set_cpu_isa(best)


@pytest.mark.parametrize("compute", ["int8", "int16", "float", "bfloat16"])
def test_routers_that_round_read_half_of_their_matrices(dense: Path, tmp_path: Path, compute: str) -> None:
    if compute == "bfloat16" and not _core.has_bfloat16():
        pytest.skip("needs AVX-512 BF16")
    folder = open_folder(routed(dense, tmp_path / "model"))
    loaded = LoadedModel(folder, WeightOptions(QuantSpec(8, "channel")), LoadOptions(compute=compute), progress=False)
    routers = loaded.routing.routers.values()
    rounded = 2 if compute in ("int8", "bfloat16") and _core.has_bfloat16() else 0
    expected = sum(array.nbytes for router in routers for array in router.tensors().values())
    expected -= rounded * sum(router.w1.size for router in routers)
    assert loaded.make_decoder().router_bytes() == expected


def test_scores_with_shared_contexts_are_those_of_the_dense_form(dense: Path, tmp_path: Path) -> None:
    folder = routed(dense, tmp_path / "model")
    model = qtale.load_torch(folder)
    context = prompts()[0]
    requests = [(context, ending) for ending in ([5], [5, 9, 30], [7, 7])] + [(context[:20], context[20:24])]
    with qtale.load(folder, progress=False) as engine:
        found = engine.loglikelihood(requests)
    for (start, ending), (value, _) in zip(requests, found, strict=True):
        logits, _ = oracle_logits(model, start + ending)
        log_probs = torch.log_softmax(torch.tensor(logits), dim=-1)
        expected = sum(float(log_probs[len(start) - 1 + i, token]) for i, token in enumerate(ending))
        assert abs(value - expected) < 1e-4 * (1 + abs(expected))


def test_caches_hold_what_executed_and_no_more(dense: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(1, VOCAB, 320).tolist()
    with qtale.load(routed(dense, tmp_path / "model"), progress=False) as engine:
        engine.logits(tokens)
        report = engine.report
    whole = report.kv_bytes[0]
    for layer in ROUTED:
        assert 0.05 < report.execution_ratio[layer] < 0.95
        assert report.kv_bytes[layer] <= (report.execution_ratio[layer] + 0.05) * whole


def test_a_static_depth_is_the_dense_form_without_those_layers(dense: Path) -> None:
    model = qtale.load_torch(dense)
    set_depth(model, (0, 3))
    tokens = prompts()[2]
    expected, _ = oracle_logits(model, tokens)
    with qtale.load(dense, progress=False) as engine:
        full = engine.logits(tokens)
        engine.set_depth([0, 3])
        assert close(engine.logits(tokens), expected)
        assert engine.report.executed == [70, 0, 0, 70]
        engine.set_depth(None)
        assert np.array_equal(engine.logits(tokens), full)
        with pytest.raises(InputError, match="no layer 4"):
            engine.set_depth([4])


def test_routers_that_do_not_fit_are_refused(dense: Path, tmp_path: Path) -> None:
    folder = routed(dense, tmp_path / "model")
    (folder / "router.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError):
        qtale.load(folder, progress=False)
