"""The engine on a real model and real text, beside transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import qtale
from pack_quantized_oracle import read_packed
from qtale import _core
from qtale.engine import Engine

# Largest difference of a logit, as a share of the range of logits.
FLOAT32, FLOAT16_CACHE, QUANTIZED, INT8 = 1e-4, 2e-3, 1e-4, 0.2
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 21, 34, 55, 64, 89, 100, 144, 233, 377, 512, 700, 1500)
PROMPTS, NEW_TOKENS, ALONE_TOKENS = 50, 16, 4
QUANTIZED_LENGTHS = (7, 90, 300)
# Where two logits are this near, rounding may choose: a share of the range.
TIE = 1e-5


@pytest.fixture(scope="module")
def text(qtale_data: Path) -> str:
    return (qtale_data / "data" / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def oracle(demo_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with qtale.load(demo_model, kv_dtype="float32", progress=False) as loaded:
        yield loaded


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.ptp(expected))


def pieces(engine: Engine, text: str, lengths: tuple[int, ...]) -> list[list[int]]:
    """Tokens of as many different passages."""
    step = len(text) // (len(lengths) + 1)
    found = []
    for index, length in enumerate(lengths):
        start = text.index(" = \n", index * step) + 4
        tokens = engine.tokenizer.encode(text[start : start + 12 * length + 200])
        found.append(tokens[:length])
    return found


def test_logits_of_real_texts(engine: Engine, oracle: Any, demo_model: Path, text: str) -> None:
    texts = pieces(engine, text, LENGTHS)
    assert [len(tokens) for tokens in texts] == list(LENGTHS)
    with qtale.load(demo_model, kv_dtype="float16", progress=False) as halves:
        for tokens in texts:
            expected = logits_of(oracle, tokens)
            assert difference(engine.logits(tokens), expected) < FLOAT32
            assert difference(halves.logits(tokens), expected) < FLOAT16_CACHE


def test_greedy_generation_of_many_prompts(engine: Engine, oracle: Any, text: str) -> None:
    prompts = pieces(engine, text, tuple(4 + 2 * index for index in range(PROMPTS)))
    together = engine.generate(prompts, NEW_TOKENS, ignore_end=True)
    ties = 0
    for prompt, generation in zip(prompts, together, strict=True):
        whole = prompt + list(generation.tokens)
        logits = logits_of(oracle, whole)[len(prompt) - 1 : -1]
        for row, token in zip(logits, generation.tokens, strict=True):
            if int(row.argmax()) != token:
                assert row.max() - row[token] < TIE * np.ptp(row)
                ties += 1
    assert ties <= 2
    for index in (0, 7, 49):
        assert engine.generate(prompts[index], NEW_TOKENS, ignore_end=True).tokens == together[index].tokens


@pytest.mark.parametrize("options", [{"kv_dtype": "float32"}, {"bits": 4, "compute": "int8"}], ids=["dense", "int8"])
def test_a_batch_of_many_prompts_gives_what_each_gives_alone(
    demo_model: Path, text: str, options: dict[str, Any]
) -> None:
    with qtale.load(demo_model, progress=False, **options) as engine:
        prompts = pieces(engine, text, tuple(1 + index for index in range(PROMPTS)))
        together = engine.generate(prompts, ALONE_TOKENS, ignore_end=True)
        for prompt, generation in zip(prompts, together, strict=True):
            assert len(prompt) == generation.prompt_tokens
            assert engine.generate(prompt, ALONE_TOKENS, ignore_end=True).tokens == generation.tokens


def quantized(demo_model: Path, folder: Path, spec: qtale.QuantSpec) -> Any:
    """Writes the folder; returns the model of its weights as the independent reader sees them."""
    qtale.quantize(demo_model, folder, spec, progress=False)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, matrix in read_packed(folder).items():
            model.get_submodule(module).weight.copy_(torch.tensor(matrix.exact()))
    return model


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / np.ptp(expected))


@pytest.mark.parametrize(("num_bits", "symmetric"), [(8, True), (4, False), (3, True)])
def test_quantized_logits_are_those_of_the_dequantized_model(
    demo_model: Path, engine: Engine, text: str, tmp_path: Path, num_bits: int, symmetric: bool
) -> None:
    dequantized = quantized(demo_model, tmp_path / "packed", qtale.QuantSpec(num_bits, symmetric=symmetric))
    texts = pieces(engine, text, QUANTIZED_LENGTHS)
    logits = [logits_of(dequantized, tokens) for tokens in texts]
    for compute, bound in (("float", QUANTIZED), ("int16", INT8 / 100), ("int8", INT8)):
        with qtale.load(tmp_path / "packed", compute=compute, kv_dtype="float32", progress=False) as packed:
            for tokens, expected in zip(texts, logits, strict=True):
                found = packed.logits(tokens)
                assert difference(found, expected) < bound
                assert rms(found, expected) < bound / 5


def test_logits_of_2_bits_differ_as_by_noise_of_the_inputs(
    demo_model: Path, engine: Engine, text: str, tmp_path: Path
) -> None:
    # Plain rounding to 2 bits leaves a model that magnifies any difference some hundred times, so no fixed bound holds:
    # noise in the embeddings alone says how far. Activations of 8 bits are beyond what it bears.
    dequantized = quantized(demo_model, tmp_path / "packed", qtale.QuantSpec(2, symmetric=False))

    def noisy(tokens: list[int], noise: float) -> np.ndarray:
        with torch.no_grad():
            inputs = dequantized.get_input_embeddings()(torch.tensor([tokens]))
            inputs = inputs * (1 + noise * torch.randn_like(inputs))
            found: np.ndarray = dequantized(inputs_embeds=inputs, use_cache=False).logits[0].numpy()
        return found

    for compute, noise in (("float", 1e-6), ("int16", 1e-4)):
        with qtale.load(tmp_path / "packed", compute=compute, kv_dtype="float32", progress=False) as packed:
            for tokens in pieces(engine, text, QUANTIZED_LENGTHS):
                expected = logits_of(dequantized, tokens)
                assert rms(packed.logits(tokens), expected) < 4 * rms(noisy(tokens, noise), expected)


def test_perplexity_is_that_of_the_torch_path(engine: Engine, oracle: Any, text: str) -> None:
    tokens = engine.tokenizer.encode(text[:9000], add_special_tokens=False)[:1536]
    losses = []
    for start in range(0, len(tokens), 512):
        window = tokens[start : start + 512]
        log_probs = torch.log_softmax(torch.tensor(logits_of(oracle, window)), dim=-1)
        losses.append(-log_probs[range(511), window[1:]].mean().item())
    expected = float(np.exp(np.mean(losses)))
    assert abs(engine.perplexity(tokens, window=512) / expected - 1) < 1e-3


def test_keys_of_8_bits_cost_no_perplexity(demo_model: Path, text: str) -> None:
    if not _core.has_int8_keys(64):
        pytest.skip("keys of 8 bits need AVX-512 BF16")
    found = {}
    for kv_dtype in ("float32", "int8-keys"):
        with qtale.load(demo_model, bits=8, compute="float", kv_dtype=kv_dtype, progress=False) as loaded:
            found[kv_dtype] = loaded.perplexity(text[:20000], window=1024)
    assert found["int8-keys"] == pytest.approx(found["float32"], rel=2e-3)
    assert found["int8-keys"] != found["float32"]
