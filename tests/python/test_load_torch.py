"""load_torch: ordinary transformers models on packed weights, compared with plain transformers on dequantized ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import qtale
from eval_samples import byte_tokenizer, tiny_llama
from pack_quantized_oracle import read_packed
from qtale import QuantSpec
from qtale.integrations.transformers import quantize_model_
from qtale.nn import QLinear

# Largest difference of a logit, as a share of the range of logits: AVX-512 BF16 keeps 17 bits of an activation.
FLOAT_BOUND = 5e-5
# Activations of 8 bits, two blocks deep.
INT8_BOUND = 3e-2
IDS = torch.tensor([[5, 40, 200, 7, 99, 250, 1, 64, 33, 180, 12, 77]])
GROUPS: tuple[int | str, ...] = (32, 64, "channel")
MIXED = {
    "model.layers.0.mlp.down_proj": QuantSpec(8, "channel"),
    "model.layers.1.mlp.down_proj": QuantSpec(3, 64, False),
    "model.layers.0.self_attn.o_proj": None,
    **{f"model.layers.1.self_attn.{part}_proj": QuantSpec(2, 32) for part in "qkv"},
}


def save_tiny(path: Path, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """A tiny Llama in float32; 192 = 3 * 64 inputs of down_proj keep several groups."""
    options = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.08, **changes}
    tiny_llama(**options).save_pretrained(path, max_shard_size=max_shard_size)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "dense", attention_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    qtale.quantize(dense, dense.parent / "packed", QuantSpec(4, 32), progress=False)
    return dense.parent / "packed"


def logits_of(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits.float()
    return logits


def oracle(dense: Path, folder: Path) -> PreTrainedModel:
    """Plain transformers in float32, its matrices those that the independent reader finds in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, matrix in read_packed(folder).items():
            model.get_submodule(module).weight.copy_(torch.tensor(matrix.dequantized()))
    return model  # type: ignore[no-any-return]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def assert_equal_logits(dense: Path, folder: Path, ids: torch.Tensor = IDS, int8_bound: float = INT8_BOUND) -> None:
    expected = logits_of(oracle(dense, folder), ids)
    for compute, bound in (("float", FLOAT_BOUND), ("int16", int8_bound / 100), ("int8", int8_bound)):
        model = qtale.load_torch(folder, compute=compute, dtype=torch.float32)
        found = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
        assert found == set(read_packed(folder))
        assert difference(logits_of(model, ids), expected) < bound, compute


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_logits_are_those_of_the_dequantized_weights(
    dense: Path, tmp_path: Path, num_bits: int, symmetric: bool
) -> None:
    for group in GROUPS:
        out = tmp_path / str(group)
        qtale.quantize(dense, out, QuantSpec(num_bits, group, symmetric), progress=False)
        assert_equal_logits(dense, out)


def test_mixed_bits_groups_symmetry_and_dense_layers(dense: Path, tmp_path: Path) -> None:
    qtale.quantize(dense, tmp_path / "out", QuantSpec(4), overrides=MIXED, progress=False)
    assert_equal_logits(dense, tmp_path / "out")
    model = qtale.load_torch(tmp_path / "out")
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert {module.spec.num_bits for module in model.modules() if isinstance(module, QLinear)} == {2, 3, 4, 8}


def test_sharded_folders_and_tied_embeddings(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", "200KB", tie_word_embeddings=True)
    qtale.quantize(dense, tmp_path / "out", QuantSpec(4), progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    whole = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    quantize_model_(whole, QuantSpec(4), compute="float", progress=False)
    model = qtale.load_torch(tmp_path / "out", compute="float", dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits_of(model), logits_of(whole.eval()))


def test_a_real_small_model(qtale_data: Path, tmp_path: Path) -> None:
    stories = qtale_data / "models" / "stories260K"
    torch.manual_seed(0)
    ids = torch.randint(3, 512, (2, 48))
    for num_bits, symmetric in ((8, True), (4, False), (4, True), (3, True), (2, False)):
        out = tmp_path / f"{num_bits}-{symmetric}"
        qtale.quantize(stories, out, QuantSpec(num_bits, symmetric=symmetric), progress=False)
        assert_equal_logits(stories, out, ids, int8_bound=5e-2)


CONFIGS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
    "gemma2": transformers.Gemma2Config,
    "olmo2": transformers.Olmo2Config,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_decoders(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 257, "head_dim": 16}
    config = CONFIGS[name](**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    qtale.quantize(tmp_path / "dense", tmp_path / "out", QuantSpec(4, 32), progress=False)
    assert_equal_logits(tmp_path / "dense", tmp_path / "out")


def test_a_dense_folder_loads_as_it_is(dense: Path) -> None:
    model = qtale.load_torch(dense)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert not any(isinstance(module, QLinear) for module in model.modules())
    assert torch.equal(logits_of(model), logits_of(plain.eval()))
    assert qtale.load_torch(dense, dtype="bfloat16").dtype == torch.bfloat16


def test_dtypes(packed: Path) -> None:
    expected = logits_of(qtale.load_torch(packed, compute="float"))
    for dtype, bound in ((torch.float16, 1e-2), ("bfloat16", 6e-2), ("auto", 1e-6), (None, 1e-6)):
        model = qtale.load_torch(packed, compute="float", dtype=dtype)
        assert model.dtype == (getattr(torch, str(dtype).removeprefix("torch."), torch.float32))
        assert difference(logits_of(model), expected) < bound
    half = qtale.load_torch(packed, compute="float").half()
    assert difference(logits_of(half), expected) < 1e-2


def test_generate_gives_the_tokens_of_the_dequantized_model(dense: Path, packed: Path) -> None:
    model, expected = qtale.load_torch(packed, compute="float"), oracle(dense, packed)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    assert not model.training
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_pipelines_take_the_model(packed: Path) -> None:
    generator = transformers.pipeline("text-generation", model=qtale.load_torch(packed), tokenizer=byte_tokenizer())
    answer = generator("Once upon", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer.startswith("Once upon")
    assert len(answer) > len("Once upon")


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_gradients_reach_the_inputs(dense: Path, packed: Path, compute: str) -> None:
    gradients = []
    for model in (qtale.load_torch(packed, compute=compute), oracle(dense, packed)):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.logsumexp(-1).sum().backward()
        gradients.append(embeddings.grad)
    found, expected = gradients
    assert found is not None
    assert expected is not None
    assert (found - expected).norm() < {"float": 1e-3, "int16": 2e-3, "int8": 0.1}[compute] * expected.norm()


def test_compiles_whole(packed: Path) -> None:
    model = qtale.load_torch(packed, compute="float")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled), logits_of(model))


def test_save_pretrained_and_copies_keep_the_quantized_model(packed: Path, tmp_path: Path) -> None:
    model = qtale.load_torch(packed)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(qtale.load_torch(tmp_path / "again")), logits_of(model))
    assert qtale.inspect(tmp_path / "again").bytes == qtale.inspect(packed).bytes
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))


def test_quantized_weights_are_in_memory_once(packed: Path) -> None:
    model = qtale.load_torch(packed)
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(tensor.nbytes for layer in layers for tensor in (*layer.buffers(), *layer.parameters()))
    # 4 bits, a float32 scale for 32 weights, biases, rows padded to panels: 4 bytes a weight would be the dense form.
    assert held < 0.8 * weights
