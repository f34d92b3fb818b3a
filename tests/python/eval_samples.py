"""Tiny models, a tokenizer and task documents for the tests of qtale.eval; everything is made here, nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Rows = list[dict[str, Any]]

# One document a task in the field names of the published sets.
CHOICES = {"text": ["the sun", "a lake", "the moon", "a small stone"], "label": ["A", "B", "C", "D"]}
DOCUMENTS: dict[str, Rows] = {
    "arc_easy": [
        {"id": "q1", "question": "What gives light?", "choices": CHOICES, "answerKey": "A"},
        {"id": "q2", "question": "What is wet, and is it cold?", "choices": CHOICES, "answerKey": "B"},
        {"id": "q3", "question": "Which one can you throw?", "choices": CHOICES, "answerKey": "D"},
    ],
    "arc_challenge": [{"id": "c1", "question": "What moves the tides?", "choices": CHOICES, "answerKey": "C"}],
    "openbookqa": [{"id": "o1", "question_stem": "Ducks swim on", "choices": CHOICES, "answerKey": " B"}],
    "piqa": [
        {"goal": "Dry a shirt", "sol1": "Hang it up.", "sol2": "Put it in the lake.", "label": 0},
        {"goal": "Cool water", "sol1": "Heat it.", "sol2": "Add some ice to it.", "label": 1},
    ],
    "boolq": [
        {"question": "is the lake wet", "passage": "A lake holds water.", "answer": True},
        {"question": "is a stone alive", "passage": "Stones are minerals.", "answer": False},
    ],
    "hellaswag": [
        {"ind": 4, "query": "Roofing: A man sits. He", "endings": ["sleeps.", "eats.", "swims.", "runs."], "label": 3}
    ],
    "winogrande": [
        {"sentence": "The cup hit the jar because _ fell.", "option1": "cup", "option2": "jar", "answer": "1"}
    ],
    "social_iqa": [
        {
            "context": "Tracy left.",
            "question": "Why?",
            "answerA": "she was tired",
            "answerB": "she ate",
            "answerC": "it rained",
            "label": "1",
        }
    ],
}
ARTICLES = (
    " \n = First = \n \n Some text here . \n \n = = Part = = \n \n More of it . \n \n = Second = \n \n Its text . \n"
)
FOLDERS = {"social_iqa": "social_i_qa"}
SCORED = {"arc_easy": "test", "arc_challenge": "test", "openbookqa": "test"}


def write_rows(file: Path, rows: Rows) -> Path:
    """A file of one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_documents(folder: Path) -> Path:
    """A data folder as ``--data`` takes it, with every task but MMLU."""
    for task, rows in DOCUMENTS.items():
        write_rows(folder / FOLDERS.get(task, task) / f"{SCORED.get(task, 'validation')}.jsonl", rows)
    (folder / "wikitext2").mkdir(parents=True)
    (folder / "wikitext2" / "wiki.test.raw").write_text(ARTICLES * 16, encoding="utf-8")
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{symbol: index + 1 for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama whose answers depend strongly on context and position."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 512, "initializer_range": 0.15}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options, **changes})).eval()


def write_model(folder: Path, **changes: Any) -> Path:
    """A folder of the tiny Llama in float16 with its tokenizer."""
    tiny_llama(**changes).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
