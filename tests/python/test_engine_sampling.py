"""The choice of tokens against plain numpy, whose filters are compared with those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from qtale import _core
from qtale.engine import Sampling
from qtale.engine.sampling import choose, token_sources
from qtale.errors import Error, InputError
from qtale.tensors import memory

Floats = npt.NDArray[np.float32]
CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 40},
    {"top_p": 0.8},
    {"top_p": 0.9999, "temperature": 3.0},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"repetition_penalty": 1.4},
    {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
]


def penalized(row: Floats, seen: set[int], penalty: float) -> Floats:
    row, factor, tokens = row.copy(), np.float32(penalty), list(seen)
    row[tokens] = np.where(row[tokens] < 0, row[tokens] * factor, row[tokens] / factor)
    return row


def filtered(row: Floats, options: Sampling) -> Floats:
    """Logits over temperature, those that are filtered out at minus infinity."""
    with np.errstate(over="ignore"):
        row = (row - row.max()) / np.float32(options.temperature)
    if 0 < options.top_k < row.size:
        row[row < np.sort(row)[-options.top_k]] = -np.inf
    if options.top_p < 1:
        # By falling logit, the larger index first among equals.
        order = np.argsort(row, kind="stable")[::-1]
        sums = np.cumsum(np.exp(row[order]), dtype=np.float64)
        row[order[1 + int(np.searchsorted(sums[:-1], options.top_p * sums[-1])) :]] = -np.inf
    if options.min_p > 0:
        row[np.exp(row) < np.float32(options.min_p)] = -np.inf
    return row


def expect_drawn(row: Floats, options: Sampling, uniform: float, token: int) -> None:
    """The first token whose cumulative sum passes the number; rounding may move that by a hundred-thousandth."""
    weights = np.exp(filtered(row, options)).astype(np.float64)
    sums = np.cumsum(weights)
    wanted, slack = uniform * sums[-1], 1e-5 * sums[-1]
    assert weights[token] > 0
    assert sums[token] - weights[token] - slack <= wanted < sums[token] + slack


def test_the_filters_of_these_tests_are_those_of_transformers() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (4, 5000)).astype(np.float32))
    seen = torch.randint(0, 5000, (4, 30), generator=torch.Generator().manual_seed(0))
    for case in CASES:
        options = Sampling(**{"temperature": 1.0, **case})
        warpers = LogitsProcessorList([logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
        warpers.append(logits_process.TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            warpers.append(logits_process.TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            warpers.append(logits_process.TopPLogitsWarper(options.top_p))
        if options.min_p:
            warpers.append(logits_process.MinPLogitsWarper(options.min_p))
        expected = torch.softmax(warpers(seen, logits.clone()), dim=1).numpy()
        rows = [
            filtered(penalized(row, set(tokens), options.repetition_penalty), options)
            for row, tokens in zip(logits.numpy(), seen.tolist(), strict=True)
        ]
        probabilities = torch.softmax(torch.from_numpy(np.stack(rows)), dim=1).numpy()
        assert ((probabilities > 0) == (expected > 0)).all(), case
        np.testing.assert_allclose(probabilities, expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("vocab", [49152, 151936])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_from_real_sizes_are_those_of_numpy(case: dict[str, Any], vocab: int) -> None:
    random = np.random.default_rng(vocab)
    options = Sampling(**{"temperature": 1.0, **case})
    logits = random.normal(0, 2, (4, vocab)).astype(np.float32)
    # Two rows that are flat, two with likely tokens.
    logits[2:, random.integers(0, vocab, 50)] += random.uniform(5, 15, 50).astype(np.float32)
    seen = random.integers(0, vocab, (4, 500)).tolist()
    sources, numbers = token_sources(4, 3), token_sources(4, 3)
    for source, tokens in zip(sources, seen, strict=True):
        source.see(tokens)
    for _ in range(3):
        tokens = choose(logits.copy(), sources, options)
        for index, token in enumerate(tokens):
            row = penalized(logits[index], set(seen[index]), options.repetition_penalty)
            expect_drawn(row, options, numbers[index].uniform(), token)


@given(
    values=st.lists(
        st.one_of(st.integers(-5, 5).map(float), st.floats(-50, 50, width=32), st.just(-np.inf)),
        min_size=1,
        max_size=90,
    ),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_row_and_options(
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seed: int,
    data: st.DataObject,
) -> None:
    row = np.array(values, dtype=np.float32)
    row[data.draw(st.integers(0, row.size - 1))] = 1.5
    seen = data.draw(st.sets(st.integers(0, row.size - 1)))
    options = Sampling(temperature, top_k, top_p, min_p, penalty)
    ((source,), (numbers,)) = (token_sources(1, seed) for _ in range(2))
    source.see(sorted(seen))
    (token,) = choose(row[None].copy(), [source], options)
    weights = np.exp(filtered(penalized(row, seen, penalty), options))
    sums = np.cumsum(weights.astype(np.float64))
    # Where a sum hits top_p or min_p but for rounding, either set is right.
    near = [
        Sampling(temperature, top_k, min(1.0, top_p * (1 + slack)), min(1.0, min_p * (1 - slack)), penalty)
        for slack in (1e-5, -1e-5)
    ]
    if all((np.exp(filtered(penalized(row, seen, penalty), each)) == weights).all() for each in near):
        expect_drawn(penalized(row, seen, penalty), options, numbers.uniform(), token)
    else:
        assert token < sums.size
    (greedy,) = choose(row[None].copy(), [source], Sampling(repetition_penalty=penalty))
    assert greedy == penalized(row, seen, penalty).argmax()


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_random_numbers_are_those_of_numpy(seed: int, index: int) -> None:
    source = _core.TokenSource(seed, index)
    key = np.array([seed, index], dtype=np.uint64)
    assert [source.uniform() for _ in range(9)] == np.random.Generator(np.random.Philox(key=key)).random(9).tolist()


def test_keys_of_the_sources() -> None:
    found = [[source.uniform() for source in token_sources(3, seed)] for seed in (5, [5, 6, 5])]
    keys = ([(5, 0), (5, 1), (5, 2)], [(5, 0), (6, 0), (5, 0)])
    assert found == [[_core.TokenSource(*key).uniform() for key in each] for each in keys]


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32)
    (source,) = token_sources(1, 7)
    drawn = [choose(logits[None].copy(), [source], Sampling(temperature=1.0))[0] for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    assert shares[1] == 0
    # Four standard deviations.
    assert np.abs(shares - probabilities).max() < 4 * np.sqrt(0.25 / 4000)


def test_small_temperatures_are_greedy() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (3, 100)).astype(np.float32)
    for temperature in (1e-3, 1e-30, 1e-60):
        options = Sampling(temperature, top_p=0.9, min_p=0.1)
        assert choose(logits.copy(), token_sources(3, 0), options) == logits.argmax(axis=1).tolist()


def test_rows_are_what_they_are_alone_on_any_number_of_threads() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (16, 30000)).astype(np.float32)
    options = Sampling(0.9, top_k=100, top_p=0.95)
    alone = [choose(row[None], token_sources(1, [4]), options)[0] for row in logits]
    for num_threads in (0, 1, 2, 5):
        assert choose(logits, token_sources(16, [4] * 16), options, num_threads) == alone


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told(wrong: float, temperature: float) -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[1, 70] = wrong
    with pytest.raises(Error, match="the model gave logits that are no finite numbers; its weights or caches overflow"):
        choose(logits, token_sources(2, 0), Sampling(temperature))


@pytest.mark.parametrize(
    ("logits", "named"),
    [
        (np.zeros((2, 4), np.float64), "logits is float64; expected float32"),
        (np.zeros(8, np.float32), r"logits has shape \[8\]; expected a matrix"),
        (np.zeros((2, 0), np.float32), r"logits has shape \[2, 0\]"),
        (np.zeros((3, 4), np.float32), "logits has 3 rows for 2 sources"),
        (np.zeros((4, 4), np.float32)[::2], "logits is not contiguous"),
        (np.zeros((4, 2), np.float32).T, "rows of logits are not contiguous"),
        ([[0.0, 1.0]] * 2, "expected a torch tensor or a numpy array, got list"),
    ],
)
def test_wrong_logits_are_named(logits: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        choose(logits, token_sources(2, 0), Sampling())


def test_wrong_tokens_and_values_are_named_by_the_core() -> None:
    (source,) = token_sources(1, 0)
    with pytest.raises(InputError, match="-1 is no token"):
        source.see([-1])
    source.see([4, 4])
    assert source.seen() == [4]
    row = np.zeros((1, 4), np.float32)
    with pytest.raises(InputError, match="token 4 was seen, but logits are of 4 tokens"):
        choose(row, [source], Sampling(repetition_penalty=1.1))
    with pytest.raises(InputError, match="sample: top_p 7"):
        _core.sample(memory(row), [source], (1.0, 0, 7.0, 0.0, 1.0), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature 'hot' is not accepted; it must be 0 (greedy) or more."),
        ({"temperature": True}, "temperature True is not accepted; it must be 0 (greedy) or more."),
        ({"temperature": 10**400}, "temperature 1"),
        ({"temperature": float("inf")}, "temperature inf is not accepted"),
        ({"temperature": None}, "temperature None is not accepted"),
        ({"top_k": True}, "top_k True is not accepted; it must be a whole number, 0 for off."),
        ({"top_k": "5"}, "top_k '5' is not accepted; it must be a whole number, 0 for off."),
        ({"top_k": 2.0}, "top_k 2.0 is not accepted"),
        ({"top_k": -1}, "top_k -1 is not accepted"),
        ({"top_p": [0.5]}, "top_p [0.5] is not accepted; it must be above 0 and at most 1."),
        ({"top_p": float("nan")}, "top_p nan is not accepted"),
        ({"min_p": 1j}, "min_p 1j is not accepted; it must be from 0 to 1."),
        ({"repetition_penalty": "x"}, "repetition_penalty 'x' is not accepted; it must be from 1e-30 to 1e30."),
    ],
)
def test_options_that_are_no_numbers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        Sampling(**options)
    assert f"generate: {message}" in str(raised.value)


def test_options_of_other_number_types() -> None:
    row = np.arange(10, dtype=np.float32)[None]
    options = Sampling(np.float32(0.5), np.int64(1), 1, 0, np.float64(1.0))  # type: ignore[arg-type]
    assert choose(row.copy(), token_sources(1, 0), options) == [9]
    assert choose(row.copy(), token_sources(1, 0), Sampling(0.01, top_k=10**30)) == [9]
