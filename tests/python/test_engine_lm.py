"""The engine scores what the harness's own HFLM scores, from texts that are tokenized together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import qtale
from eval_samples import byte_tokenizer, write_model
from qtale.integrations.engine_lm import EngineLM

PAIRS = [
    ("Question: What gives light?\nAnswer:", " the sun"),
    ("Question: What gives light?\nAnswer:", " a lake"),
    ("Question: \t ", "one"),
    ("<|end|>Question: ", "two"),
    ("", "an empty context"),
    (" ", "only a space before"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine_lm") / "model")


def _requests() -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]


def _engine_lm(folder: Path, **options: Any) -> EngineLM:
    return EngineLM(qtale.load(folder, compute="float", progress=False), byte_tokenizer(), **options)


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_answers_are_those_of_hflm(folder: Path, add_bos_token: bool | None) -> None:
    lm = _engine_lm(folder, add_bos_token=add_bos_token)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), add_bos_token=add_bos_token)
    requests = [request for request in _requests() if request.args[0] != " "]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_texts_are_tokenized_together_as_they_are_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _engine_lm(folder)
    texts = sorted({text for context, end in PAIRS for text in (context, context + end)})
    assert lm._encode_all(texts, disable_tqdm=True) == {text: lm.tok_encode(text) for text in texts}
    alone: list[str] = []
    encode = lm.tokenizer.encode

    def counted(text: str, **options: Any) -> list[int]:
        alone.append(text)
        return list(encode(text, **options))

    monkeypatch.setattr(lm.tokenizer, "encode", counted)
    lm.loglikelihood([request for request in _requests() if request.args[0] != " "], disable_tqdm=True)
    assert alone == ["an empty context"]
    assert not lm._encoded
