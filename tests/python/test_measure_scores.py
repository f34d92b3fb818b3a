"""Scores equal those of an independent, straightforward implementation on the whole model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from importance_samples import (
    LAYERS,
    hidden_states,
    linear_weights,
    load_model,
    plain_error,
    plain_fisher,
    plain_jaccard,
    plain_zd,
    rounded,
    save_model,
    some_tokens,
    top_sets,
)
from qtale import MeasureOptions
from qtale.importance import METRICS, Importance, measure_tokens

# Large enough for several batches of every kind.
SEQUENCES = 5


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = save_model(tmp_path_factory.mktemp("model") / request.param, request.param)
    return path, load_model(path), some_tokens(SEQUENCES)


def measured(path: Path, tokens: np.ndarray, **settings) -> Importance:
    return measure_tokens(path, tokens, MeasureOptions(**settings), progress=False)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("norm", ["none", "final"])
@pytest.mark.parametrize("matrix", ["embed", "lm_head"])
def test_jaccard_is_exact(sample, matrix: str, norm: str, positions: str) -> None:
    path, whole, tokens = sample
    options = {"matrix": matrix, "norm": norm, "positions": positions}
    found = measured(path, tokens, metrics=("jaccard",), top_k=10, **options)
    expected = plain_jaccard(whole, tokens, 10, **options)
    np.testing.assert_allclose(found.per_sequence["jaccard"], expected, rtol=1e-12)
    np.testing.assert_allclose(found.scores["jaccard"], expected.mean(0), rtol=1e-12)
    assert 0 < expected.min() < expected.max() <= 1


def test_token_sets_are_those_of_the_last_position_at_every_boundary(sample) -> None:
    path, whole, tokens = sample
    found = measured(path, tokens, metrics=("jaccard",), top_k=7, positions="all")
    states, matrix = hidden_states(whole, tokens), whole.model.embed_tokens.weight.detach()
    for boundary, state in enumerate(states):
        assert [set(sets[boundary]) for sets in found.token_sets] == top_sets(state[:, -1], matrix, 7)
    first = states[0][0, -1] @ matrix.T
    assert found.token_sets[0][0] == first.argsort(descending=True)[:7].tolist()


def test_the_whole_vocabulary_and_a_single_token(sample) -> None:
    path, _, tokens = sample
    vocab = load_model(path).config.vocab_size
    assert measured(path, tokens, metrics=("jaccard",), top_k=vocab).scores["jaccard"] == [0.0] * LAYERS
    assert set(np.ravel(measured(path, tokens, metrics=("jaccard",), top_k=1).per_sequence["jaccard"])) <= {0.0, 1.0}


def test_cosines(sample) -> None:
    path, whole, tokens = sample
    states = hidden_states(whole, tokens)
    cosines = torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in itertools.pairwise(states)])
    last = measured(path, tokens, metrics=("lim", "bi"))
    everywhere = measured(path, tokens, metrics=("lim",), positions="all")
    np.testing.assert_allclose(last.per_sequence["lim"], -cosines[..., -1].T, atol=1e-5)
    np.testing.assert_allclose(last.scores["lim"], -cosines[..., -1].mean(1), atol=1e-5)
    np.testing.assert_allclose(last.scores["bi"], 1 - cosines.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(everywhere.scores["lim"], -cosines.mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize("tail", ["upper", "both"])
def test_zd_and_its_direction(sample, tail: str) -> None:
    path, whole, tokens = sample
    expected = [plain_zd(whole, layer, tail) for layer in range(LAYERS)]
    paper = measured(path, tokens, metrics=("zd",), zd_tail=tail)
    assert paper.per_sequence == {}
    np.testing.assert_allclose(paper.scores["zd"], [-share for share in expected], atol=1e-5)
    reversed_order = measured(path, tokens, metrics=("zd",), zd_tail=tail, zd_order="reversed")
    assert reversed_order.ranking("zd") == sorted(range(LAYERS), key=lambda layer: -expected[layer])
    assert paper.ranking("zd") == reversed_order.ranking("zd")[::-1]


@pytest.mark.parametrize("bits", [4, 2])
def test_quantization_errors(sample, bits: int) -> None:
    path, whole, tokens = sample
    found = measured(path, tokens, metrics=("error",), error_bits=bits, group_size=32)
    np.testing.assert_allclose(
        found.scores["error"], [plain_error(whole, layer, bits) for layer in range(LAYERS)], rtol=1e-5
    )
    assert set(found.errors) == {"8", "4", "3", "2"}
    for name, weight in linear_weights(whole, 1).items():
        assert found.errors["3"][name] == pytest.approx(relative_square(weight, 3, torch.float32), rel=1e-4)


def relative_square(weight: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> float:
    weight = weight.detach()
    return float((rounded(weight, bits, 32, scale_dtype) - weight).norm() / weight.norm()) ** 2


def test_scales_are_rounded_as_quantize_stores_them(tmp_path: Path) -> None:
    path, tokens = save_model(tmp_path / "half", "llama", torch.bfloat16), some_tokens(1)
    found = measured(path, tokens, metrics=("error",), group_size=32)
    for name, weight in linear_weights(load_model(path), 0).items():
        assert found.errors["4"][name] == pytest.approx(relative_square(weight, 4, torch.bfloat16), rel=1e-4)


def test_fisher_equals_gradients_of_the_whole_model(sample) -> None:
    path, whole, tokens = sample
    found = measured(path, tokens, metrics=("fisher",), group_size=32, error_bits=3, loss_sequences=3)
    expected = plain_fisher(whole, tokens[:3], 3)
    costs = found.module_costs["fisher"]
    assert set(costs) == {"8", "4", "3", "2"}
    assert costs["3"] == pytest.approx(expected, rel=1e-4)
    sums = [sum(v for name, v in expected.items() if f".{layer}." in name) for layer in range(LAYERS)]
    assert found.scores["fisher"] == pytest.approx(sums, rel=1e-4)


def test_fisher_predicts_what_small_errors_do_to_the_loss(tmp_path: Path) -> None:
    # On its own samples a random model's gradients vanish on average, as the prediction assumes.
    path = save_model(tmp_path / "model")
    whole = load_model(path)
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = torch.randint(1, 96, (400, 1))
        for _ in range(11):
            tokens = torch.cat([tokens, torch.multinomial(whole(tokens).logits[:, -1].softmax(-1), 1)], 1)
    settings = {"group_size": 32, "error_bits": 8, "loss_sequences": 400}
    predicted = measured(path, tokens.numpy(), metrics=("fisher",), **settings).scores["fisher"][1]
    with torch.no_grad():
        expected = whole(tokens).logits[:, :-1].log_softmax(-1)
        for weight in linear_weights(whole, 1).values():
            weight.copy_(rounded(weight, 8, 32, torch.float32))
        changed = whole(tokens).logits[:, :-1].log_softmax(-1)
    divergence = (expected.exp() * (expected - changed)).sum(-1).mean()
    assert predicted == pytest.approx(float(divergence), rel=0.25)


def test_noise_equals_disturbing_the_whole_model(sample) -> None:
    path, whole, tokens = sample
    found = measured(path, tokens, metrics=("noise",), noise=0.2, loss_sequences=4, seed=3).scores["noise"]
    with torch.no_grad():
        expected = whole(torch.from_numpy(tokens[:4])).logits.log_softmax(-1)
        for layer in range(LAYERS):
            generator = torch.Generator().manual_seed(3 * 100_003 + layer)
            stored = {name: weight.clone() for name, weight in linear_weights(whole, layer).items()}
            for weight in linear_weights(whole, layer).values():
                noise = torch.randn(weight.shape, generator=generator) / weight.numel() ** 0.5
                weight += 0.2 * weight.norm() * noise
            changed = whole(torch.from_numpy(tokens[:4])).logits.log_softmax(-1)
            divergence = float((expected.exp() * (expected - changed)).sum(-1).mean())
            assert found[layer] == pytest.approx(divergence / 0.2**2, rel=1e-3)
            for name, weight in linear_weights(whole, layer).items():
                weight.copy_(stored[name])


def test_kl_equals_rounding_the_whole_model(sample) -> None:
    path, whole, tokens = sample
    settings = {"group_size": 32, "loss_sequences": 4, "error_bits": 4}
    found = measured(path, tokens, metrics=("fisher", "kl"), **settings)
    with torch.no_grad():
        expected = whole(torch.from_numpy(tokens[:4])).logits.log_softmax(-1)
        for layer in range(LAYERS):
            stored = {name: weight.clone() for name, weight in linear_weights(whole, layer).items()}
            for weight in linear_weights(whole, layer).values():
                weight.copy_(rounded(weight, 4, 32, torch.float32))
            changed = whole(torch.from_numpy(tokens[:4])).logits.log_softmax(-1)
            divergence = float((expected.exp() * (expected - changed)).sum(-1).mean())
            assert found.scores["kl"][layer] == pytest.approx(
                divergence, rel=0.05
            )  # weights midway between codes may go either way
            for name, weight in linear_weights(whole, layer).items():
                weight.copy_(stored[name])
    costs = {name: cost for name, cost in found.module_costs["kl"]["4"].items() if ".layers.1." in name}
    predicted = {name: found.module_costs["fisher"]["4"][name] for name in costs}
    assert sum(costs.values()) == pytest.approx(found.scores["kl"][1])
    shares = [costs[name] / predicted[name] for name in costs]
    assert max(shares) == pytest.approx(min(shares))


def test_random_depends_on_the_seed_alone(sample) -> None:
    path, _, tokens = sample
    one = measured(path, tokens, metrics=("random",), seed=1).scores["random"]
    assert one == measured(path, tokens[:2], metrics=("random",), seed=1).scores["random"]
    assert one != measured(path, tokens, metrics=("random",), seed=2).scores["random"]
    assert len(set(one)) == LAYERS


def test_files_instead_of_memory_change_nothing(sample) -> None:
    path, _, tokens = sample
    options = MeasureOptions(metrics=METRICS, top_k=9, loss_sequences=2)
    in_memory = measure_tokens(path, tokens, options, progress=False)
    in_files = measure_tokens(path, tokens, options, max_memory=0, progress=False)
    assert in_memory == in_files
    assert list(in_memory.scores) == list(METRICS)
    assert in_memory.settings == dataclasses.replace(options, num_sequences=SEQUENCES, seq_len=14).to_json()
