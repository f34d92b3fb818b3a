"""QtaleLM scores what the harness's own HFLM scores, document by document."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from eval_samples import byte_tokenizer, tiny_llama, write_model
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.eval.perplexity import perplexity
from qtale.integrations.lm_eval import QtaleLM
from qtale.integrations.transformers import quantize_model_
from qtale.nn import QLinear
from qtale.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")


PAIRS = [
    ("Question: What gives light?\nAnswer:", [" the sun", " a lake", " the", " t"]),
    ("Question: What gives heat?\nAnswer:", [" fire", " ice and snow"]),
    ("Question: ", ["one", "two"]),
    ("", ["an empty context", "another"]),
    ("The cup hit the jar because cup", [" fell."]),
    ("The cup hit the jar because jar", [" fell."]),
    ("Question: " + "very long " * 12, [" yes", " no"]),
]


def _requests(pairs: list[tuple[str, list[str]]]) -> list[Instance]:
    flat = [(context, choice) for context, choices in pairs for choice in choices]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(flat)]


def _both(model: Any, requests: list[Instance], **options: Any) -> tuple[QtaleLM, list[Any], list[Any]]:
    lm = QtaleLM(model, byte_tokenizer(), **options)
    options = {key: options[key] for key in options if key == "max_length"}
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=8, **options)
    return lm, lm.loglikelihood(requests, disable_tqdm=True), plain.loglikelihood(requests, disable_tqdm=True)


def _assert_same(found: list[Any], expected: list[Any], relative: float = 1e-4) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=relative)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def _documents(data: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    with (data / "data/arc_easy/test.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, islice(lines, count)):
            yield f"Question: {row['question']}\nAnswer:", [f" {text}" for text in row["choices"]["text"]]
    with (data / "data/piqa/validation.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, islice(lines, count)):
            yield f"Question: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"]


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 3}, {"tokens_per_pass": 40}])
def test_scores_equal_those_of_hflm(options: dict[str, Any]) -> None:
    lm, found, expected = _both(tiny_llama(), _requests(PAIRS), **options)
    assert lm.shares_prefixes
    _assert_same(found, expected)


def test_scores_equal_those_of_hflm_on_real_documents(qtale_data: Path) -> None:
    requests = _requests(list(_documents(qtale_data, 60)))
    lm, found, expected = _both(tiny_llama(), requests)
    assert lm.shares_prefixes
    _assert_same(found, expected, 1e-3)
    # Shared tokens went through the model once.
    assert lm.tokens_done < 0.6 * sum(len(lm.tok_encode("".join(request.args))) for request in requests)


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_quantized_models_share_prefixes_in_their_own_mode(compute: str) -> None:
    model = tiny_llama()
    quantize_model_(model, QuantSpec(4, 32), compute=compute, progress=False)
    lm, found, expected = _both(model, _requests(PAIRS))
    assert lm.shares_prefixes
    assert {layer.compute for layer in model.modules() if isinstance(layer, QLinear)} == {compute}
    _assert_same(found, expected, {"int8": 0.05, "int16": 5e-4, "float": 1e-4}[compute])


def test_requests_that_are_too_long_are_cut_as_hflm_cuts_them() -> None:
    lm, found, expected = _both(tiny_llama(), _requests(PAIRS), max_length=48)
    assert lm.shares_prefixes
    _assert_same(found, expected)


def test_scoring_twice_gives_the_same_bits() -> None:
    lm = QtaleLM(tiny_llama(), byte_tokenizer())
    first, second = (lm.loglikelihood(_requests(PAIRS), disable_tqdm=True) for _ in range(2))
    assert first == second


def test_rolling_windows_equal_those_of_hflm() -> None:
    model, requests = tiny_llama(), [Instance("loglikelihood_rolling", {}, ("some text to roll over " * 9,), 0)]
    found = QtaleLM(model, byte_tokenizer(), max_length=50).loglikelihood_rolling(requests, disable_tqdm=True)
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, max_length=50)
    assert found == pytest.approx(plain.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)


def _mistral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        **sizes, num_key_value_heads=2, vocab_size=257, sliding_window=16, initializer_range=0.15
    )
    return transformers.MistralForCausalLM(config).eval()


def _gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=257, initializer_range=0.15)
    return transformers.GPT2LMHeadModel(config).eval()


def _mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=257, initializer_range=0.15)
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize(("make", "trees"), [(_mistral, False), (_gpt2, True), (_mamba, False)])
def test_models_that_trees_would_change_are_scored_plainly(make: Any, trees: bool) -> None:
    lm, found, expected = _both(make(), _requests(PAIRS))
    assert lm.shares_prefixes is trees
    _assert_same(found, expected)


def test_a_sliding_window_is_noticed_when_longer_requests_come() -> None:
    lm = QtaleLM(_mistral(), byte_tokenizer())
    short = _requests([("One", [" two", " three"])])
    lm.loglikelihood(short, disable_tqdm=True)
    assert lm.shares_prefixes
    plain = HFLM(pretrained=lm.model, tokenizer=byte_tokenizer(), batch_size=1)
    long = _requests(PAIRS)
    _assert_same(lm.loglikelihood(long, disable_tqdm=True), plain.loglikelihood(long, disable_tqdm=True))
    assert not lm.shares_prefixes


def test_answers_are_cached_by_request(tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    lm = QtaleLM(tiny_llama(), byte_tokenizer())
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    first = cached.loglikelihood(_requests(PAIRS))
    done = lm.requests_done
    assert [tuple(answer) for answer in cached.loglikelihood(_requests(PAIRS))] == first
    assert lm.requests_done == done


def test_perplexity_is_that_of_separate_windows() -> None:
    model, text = tiny_llama(), "Some text that is cut into windows of equal length. " * 6
    lm = QtaleLM(model, byte_tokenizer())
    found = perplexity(lm, text, windows=3, window_tokens=64)
    tokens = torch.tensor(lm.tok_encode(text)[: 3 * 64]).view(3, 64)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in tokens]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found.windows, found.windows_in_text) == (3, len(text) // 64)


def test_perplexity_needs_a_window() -> None:
    lm = QtaleLM(tiny_llama(), byte_tokenizer())
    with pytest.raises(InputError, match="at least one window of 64 tokens"):
        perplexity(lm, "short", window_tokens=64)


def test_a_folder_is_loaded_as_lm_eval_names_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    lm = QtaleLM.create_from_arg_string(f"pretrained={folder},dtype=float32", {"batch_size": 4, "device": "cpu"})
    direct = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    requests = _requests(PAIRS)
    _assert_same(lm.loglikelihood(requests), QtaleLM(direct, byte_tokenizer()).loglikelihood(requests))


def test_generation_is_hflms() -> None:
    request = [Instance("generate_until", {}, ("Question:", {"until": ["\n"], "max_gen_toks": 4}), 0)]
    model = tiny_llama()
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    found = QtaleLM(model, byte_tokenizer()).generate_until(request, disable_tqdm=True)
    assert found == plain.generate_until(request, disable_tqdm=True)


def test_bad_arguments_are_sentences(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(InputError, match="compute 'int4' is not known"):
        QtaleLM(folder, compute="int4")
    with pytest.raises(InputError, match="dtype 'int8' is not known"):
        QtaleLM(folder, dtype="int8")
    with pytest.raises(InputError, match="device 'nowhere' cannot be used"):
        QtaleLM(folder, device="nowhere")
    with pytest.raises(CheckpointError, match="no such folder"):
        QtaleLM(tmp_path / "absent")
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UnsupportedError, match="transformers cannot load it"):
        QtaleLM(folder)
