"""EngineLM beside QtaleLM on PyTorch and the harness's own HFLM, request by request: dense, quantized and cut."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtale
from eval_samples import write_model
from qtale.errors import InputError
from qtale.integrations.engine_lm import EngineLM
from qtale.integrations.lm_eval import QtaleLM
from stories_samples import stories_folder

# Largest difference of a log-likelihood as a share of it: sums of float32 in another order.
BOUND = 1e-4
KINDS = ("dense", "packed")
DOCUMENTS, MAX_LENGTHS = 24, (None, 40, 9)
PAIRS = [
    ("Question: What gives light?\nAnswer:", " the sun"),
    ("Question: What gives light?\nAnswer:", " a lake"),
    ("Question: What gives heat?\nAnswer:", " fire"),
    ("Question: ", "one"),
    ("", "context"),
    ("Question: " + "very long " * 12, " yes"),
    ("Question: " + "very long " * 12, " no"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def both_kinds(dense: Path, packed: Path, group_size: int | str) -> dict[str, Path]:
    qtale.quantize(dense, packed, qtale.QuantSpec(4, group_size), progress=False)
    return {"dense": dense, "packed": packed}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return both_kinds(write_model(root / "dense"), root / "packed", 32)


@pytest.fixture(scope="module")
def stories(qtale_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real model; its 172 inputs of down_proj are no whole groups, so rows have one scale."""
    root = tmp_path_factory.mktemp("stories")
    return both_kinds(stories_folder(qtale_data, root / "dense"), root / "packed", "channel")


def models(folder: Path, kind: str, **options: Any) -> tuple[EngineLM, QtaleLM, HFLM]:
    """The engine, the torch path and the harness's own, with activations as they are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "packed":
        model = qtale.load_torch(folder, compute="float", dtype=torch.float32)
        # HFLM would import compressed-tensors for what qtale has loaded already.
        vars(model.config).pop("quantization_config", None)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = qtale.load(folder, compute="float", kv_dtype="float32", progress=False)
    return (
        EngineLM(engine, tokenizer, **options),
        QtaleLM(model, tokenizer, **options),
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options),
    )


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def questions(data: Path) -> list[dict[str, Any]]:
    with (data / "data/arc_easy/test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, DOCUMENTS)]


def real_pairs(data: Path) -> list[tuple[str, str]]:
    return [
        (f"Question: {row['question']}\nAnswer:", f" {text}")
        for row in questions(data)
        for text in row["choices"]["text"]
    ]


def assert_scores_agree(lms: tuple[EngineLM, QtaleLM, HFLM], pairs: list[tuple[str, str]]) -> list[bool]:
    """Compares answers one by one; returns the greedy flags."""
    mine, *others = (lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for lm in lms)
    for answers in others:
        for pair, (value, greedy), (expected, best) in zip(pairs, mine, answers, strict=True):
            assert value == pytest.approx(expected, rel=BOUND, abs=BOUND), pair
            assert greedy == best, pair
    return [greedy for _, greedy in mine]


@pytest.mark.parametrize("max_length", [None, 60, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_torch_however_long_the_context(
    made: dict[str, Path], kind: str, max_length: int | None
) -> None:
    assert_scores_agree(models(made[kind], kind, max_length=max_length), PAIRS)


@pytest.mark.parametrize("max_length", MAX_LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_real_questions_are_those_of_torch(
    qtale_data: Path, stories: dict[str, Path], kind: str, max_length: int | None
) -> None:
    lms, pairs = models(stories[kind], kind, max_length=max_length), real_pairs(qtale_data)
    longest = max(len(lms[0].tok_encode(context)) for context, _ in pairs)
    fitting = [pair for pair in pairs if len(lms[0].tok_encode(pair[1])) <= (max_length or longest)]
    assert len(fitting) > DOCUMENTS // 2
    assert max_length is None or longest > 2 * max_length
    # What the model itself would say, so that some answers are greedy.
    contexts = [context for context, _ in pairs[::16]]
    said = lms[0].engine.generate([lms[0].tok_encode(context)[-8:] for context in contexts], 2, ignore_end=True)
    words = [lms[0].tokenizer.decode(generation.tokens) for generation in said]
    greedy = assert_scores_agree(lms, fitting + list(zip(contexts, words, strict=True)))
    assert not all(greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_what_greedy_decoding_says_is_greedy_in_all(stories: dict[str, Path], kind: str) -> None:
    lms = models(stories[kind], kind)
    starts = ["Once upon a time", "One day, a little girl", "Tom and Lily went to the", "The big red"]
    pairs = []
    for start in starts:
        tokens = lms[0].tok_encode(start)
        tokens += lms[0].engine.generate(tokens, 12, ignore_end=True).tokens
        whole = lms[0].tokenizer.decode(tokens, skip_special_tokens=True)
        pairs.append((start, whole.removeprefix(start)))
    assert all(assert_scores_agree(lms, pairs))
    assert not any(assert_scores_agree(lms, [(start, f"{words} xyz") for start, words in pairs]))


@pytest.mark.parametrize("max_length", MAX_LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_scores_are_those_of_torch(
    qtale_data: Path, stories: dict[str, Path], kind: str, max_length: int | None
) -> None:
    lms = models(stories[kind], kind, max_length=max_length)
    texts = [(row["question"],) for row in questions(qtale_data)[:6]]
    texts += [(" ".join(row["question"] for row in questions(qtale_data)),), ("A",)]
    assert len(lms[0].tok_encode(texts[-2][0])) > lms[0].max_length
    mine, *others = (
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for lm in lms
    )
    for answers in others:
        assert mine == pytest.approx(answers, rel=BOUND)


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_texts_are_those_of_torch(
    qtale_data: Path, stories: dict[str, Path], kind: str, max_length: int | None
) -> None:
    lms = models(stories[kind], kind, max_length=max_length)
    contexts = [f"{row['question']} Once upon a time" for row in questions(qtale_data)[:6]]
    assert max(len(lms[0].tok_encode(context)) for context in contexts) > 32
    options: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 16},
        {"until": [".", "She"], "max_gen_toks": 16, "do_sample": False},
        {"until": [], "max_gen_toks": 5},
    ]
    arguments = [(context, options[index % 3]) for index, context in enumerate(contexts)]
    arguments.append((contexts[0], options[1]))
    mine, *others = (lm.generate_until(requests("generate_until", arguments), disable_tqdm=True) for lm in lms)
    for answers in others:
        assert mine == answers
    assert all(mine)
    assert "." not in mine[1]


def test_a_continuation_longer_than_the_model_reads_is_refused(made: dict[str, Path]) -> None:
    lm, *_ = models(made["dense"], "dense", max_length=10)
    with pytest.raises(InputError, match="a continuation of 11 tokens is longer than the 10 that the model reads"):
        lm.loglikelihood(requests("loglikelihood", [("a", " " + "b" * 10)]), disable_tqdm=True)
    with pytest.raises(InputError, match="10 tokens to generate leave no room in the 10"):
        lm.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 10})]))
