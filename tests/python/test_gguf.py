"""import-gguf: the same model as before, for every architecture, and no trust in what a file says of itself."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from gguf_samples import CHAT, TOKENS, Edit, tiny_model, write_gguf
from qtale import demo
from qtale.cli import import_gguf as verb
from qtale.errors import CheckpointError, Error, InputError, UnsupportedError
from qtale.integrations.gguf import import_gguf


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def good(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny).read_bytes()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None] * 7 % len(TOKENS)).logits


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
)
def test_a_model_survives_the_way_through_gguf(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tied=tied)
    file = write_gguf(tmp_path / "a.gguf", model, architecture)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    out = import_gguf(file, tmp_path / "out", dtype="float32", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert not hasattr(again.config, "quantization_config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT
    assert tokenizer.decode(tokenizer("hello  12 wörld").input_ids) == "hello  12 wörld"
    assert tokenizer.model_max_length == 128
    assert again.generation_config.eos_token_id == len(TOKENS) - 1


@pytest.mark.parametrize(("stored", "dtype"), [("Q8_0", "float16"), ("Q4_1", "bfloat16"), ("F16", "float32")])
def test_weights_are_the_dequantized_ones_rounded_once(tmp_path: Path, tiny: Any, stored: str, dtype: str) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny, stored=stored)
    out = import_gguf(file, tmp_path / "out", dtype=dtype, progress=False)
    found = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    kind = gguf.GGMLQuantizationType[stored]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        coded = gguf.quants.dequantize(gguf.quants.quantize(tiny.state_dict()[name].numpy(), kind), kind)
        expected = torch.from_numpy(np.ascontiguousarray(coded)).to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_a_sentencepiece_vocabulary_reads_text_as_before(tmp_path: Path) -> None:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces = ["▁", *"abcdehlorw", "he", "ll", "▁w", "hell", "hello", "▁hello", "or", "▁wor", "ld", "▁world"]
    tokens = special + pieces

    def speak(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        for name in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
            del writer.kv_data[0][name]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(special) + [-float(rank) for rank in range(len(pieces))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    file = write_gguf(tmp_path / "a.gguf", tiny_model("llama", vocab_size=len(tokens)), edit=speak)
    out = import_gguf(file, tmp_path / "out", progress=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    ours = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("hello world", " hello", "held ü  word</s>", ""):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours("hello world").input_ids == [1, tokens.index("▁hello"), tokens.index("▁world")]


def test_llama3_rope_scaling_is_kept(tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    model = tiny_model("llama", rope_parameters=rope)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 30, "the test must reach scaled frequencies"

    def with_factors(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = factors

    file = write_gguf(tmp_path / "a.gguf", model, edit=with_factors)
    out = import_gguf(file, tmp_path / "out", dtype="float32", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)

    def with_others(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = factors[::-1].copy()

    with pytest.raises(UnsupportedError, match="not those of Llama"):
        import_gguf(write_gguf(tmp_path / "b.gguf", model, edit=with_others), tmp_path / "b", progress=False)


def drop(name: str) -> Edit:
    return lambda writer, tensors: tensors.__delitem__(name)


def put(name: str, array: np.ndarray) -> Edit:
    return lambda writer, tensors: tensors.__setitem__(name, array)


def say(key: str, value: int) -> Edit:
    return lambda writer, tensors: writer.add_uint32(key, value)


@pytest.mark.parametrize(
    ("edit", "kind", "text"),
    [
        (drop("blk.1.attn_k.weight"), CheckpointError, "blk.1.attn_k.weight' is missing"),
        (drop("token_embd.weight"), CheckpointError, "token_embd.weight' is missing"),
        (put("blk.0.attn_q.bias", np.zeros(64, np.float32)), UnsupportedError, "does not know the tensor"),
        (put("blk.2.attn_norm.weight", np.zeros(64, np.float32)), UnsupportedError, "does not know the tensor"),
        (
            put("blk.0.ffn_up.weight", np.zeros((95, 64), np.float32)),
            CheckpointError,
            r"\[95, 64\], expected \[96, 64\]",
        ),
        (put("token_embd.weight", np.zeros((7, 64), np.float32)), CheckpointError, "embedding has 7 rows"),
        (say("llama.expert_count", 8), UnsupportedError, "mixture of experts"),
        (say("llama.attention.sliding_window", 64), UnsupportedError, "sliding window"),
        (say("split.count", 3), UnsupportedError, "several files"),
        (say("llama.vocab_size", 1 << 31), CheckpointError, "vocabulary"),
        (
            lambda writer, tensors: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            UnsupportedError,
            "scaled rope",
        ),
    ],
)
def test_files_that_cannot_become_the_right_model(
    tmp_path: Path, tiny: Any, edit: Edit, kind: type[Error], text: str
) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny, edit=edit)
    with pytest.raises(kind, match=text):
        import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_other_architectures_are_named(tmp_path: Path, tiny: Any) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny, "gemma3")
    with pytest.raises(UnsupportedError, match=r"llama, qwen2, qwen3 .* not 'gemma3'"):
        import_gguf(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "kind", "text"), [(1e6, InputError, "bfloat16"), (float("nan"), CheckpointError, "NaN")]
)
def test_values_that_float16_cannot_hold(tmp_path: Path, tiny: Any, value: float, kind: type[Error], text: str) -> None:
    def spoil(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_up.weight"] = np.full((96, 64), value, np.float32)

    file = write_gguf(tmp_path / "a.gguf", tiny, edit=spoil)
    with pytest.raises(kind, match=text):
        import_gguf(file, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_an_existing_folder_and_other_wrong_arguments(tmp_path: Path, good: bytes) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(good)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        import_gguf(file, tmp_path / "out")
    with pytest.raises(InputError, match="not 'int8'"):
        import_gguf(file, tmp_path / "new", dtype="int8")
    with pytest.raises(InputError, match="not a file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "new")
    with pytest.raises(InputError, match="not a file"):
        import_gguf(tmp_path, tmp_path / "new")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(good)
    code = (
        "import resource, sys; from qtale.integrations.gguf import import_gguf; from qtale.errors import Error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "try: import_gguf('a.gguf', 'out', dtype='float32', progress=False)\n"
        "except Error as error: print('sentence:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sentence:"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_command_line(tmp_path: Path, good: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "a.gguf", tmp_path / "out"
    file.write_bytes(good)
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    arguments = [str(file), "-o", str(out), "--dtype", "bfloat16"]
    assert verb.run(parser.parse_args([*arguments, "--dry-run", "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert (report["architecture"], report["layers"], report["hidden_size"]) == ("llama", 2, 64)
    assert report["tensor_types"] == {"F32": 20}
    assert verb.run(parser.parse_args(arguments)) == 0
    assert "wrote bfloat16 weights" in capsys.readouterr().out
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0 < size - report["bytes_out"] < 4096, "the announced bytes are those written, but for the header"
    with pytest.raises(InputError, match="exists already"):
        verb.run(parser.parse_args([*arguments, "--dry-run"]))


def test_the_demo_model_is_what_transformers_reads_from_the_file(demo_model: Path) -> None:
    file = demo.gguf_file(progress=False)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    ours = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)

    text = "Photosynthesis turns  12 parts of sunlight\n\n into 345 sugars; naïve, isn't it?<|im_end|>"
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded.input_ids.tolist() == their_tokenizer(text, return_tensors="pt").input_ids.tolist()
    assert tokenizer.chat_template == their_tokenizer.chat_template
    with torch.no_grad():
        found, expected = ours(**encoded).logits, theirs(**encoded).logits
        theirs.load_state_dict({name: tensor.half().float() for name, tensor in theirs.state_dict().items()})
        rounded = theirs(**encoded).logits
    assert torch.equal(found, rounded)
    assert (found - expected).abs().max() < 2e-3 * (expected.max() - expected.min())

    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = ours.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
