"""The tiny pretrained Llama of the real data, as a folder with the tokenizer of its own."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "▁"


def _pieces(path: Path) -> list[tuple[str, float]]:
    """(text, score) of each token of a file that llama2.c reads: pairs of a float and a counted string."""
    raw, at = path.read_bytes(), 4
    found = []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        found.append((raw[at + 8 : at + 8 + length].decode("utf-8").replace(" ", SPACE), score))
        at += 8 + length
    return found


def stories_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of Llama's kind: what is not in the vocabulary is spelled in bytes, and BOS comes first."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = _pieces(path)
    vocabulary = {text: index for index, text in enumerate(special)}
    vocabulary |= {text: index for index, (text, _) in enumerate(pieces) if index >= len(special)}
    # Of two parts that are tokens themselves, those of the highest score are joined first.
    merges = [
        (score, (text[:cut], text[cut:]))
        for text, score in pieces[len(special) :]
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(
        vocab=vocabulary, merges=[pair for _, pair in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def stories_folder(data: Path, folder: Path) -> Path:
    """The model and its tokenizer as transformers reads them."""
    source = data / "models" / "stories260K"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    stories_tokenizer(source / "tok512.bin").save_pretrained(folder)
    return folder
