"""Make the small folders in tests/python/samples/llmcompressor with llm-compressor, the oracle of the disk format.

llm-compressor pins its own transformers and compressed-tensors, so it lives in an environment of its own:

    python3 -m venv llmc && llmc/bin/pip install torch==2.13.0 && llmc/bin/pip install llmcompressor==0.14.0.1
    llmc/bin/python tests/oracles/make_llmcompressor_samples.py

Every sample is a seeded random Llama, quantized without data (round to nearest) and saved with ``save_compressed``:

    NAME/                     config.json and model.safetensors as llm-compressor wrote them
    NAME.weights.json         per quantized module: dtype, shape and SHA-256 of the weight that compressed-tensors
                              decompresses (little-endian, row-major), and the versions that made it
    NAME.logits.safetensors   input_ids [1, 12] and logits [1, 12, vocab]: transformers in float32 on the weights that
                              compressed-tensors decompresses in float32, that is without rounding to the scale's dtype
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

DEFAULT_OUT = Path(__file__).parents[1] / "python" / "samples" / "llmcompressor"
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")
SEED = 20261121
TOKENS = 12


@dataclass(frozen=True)
class Sample:
    """One folder: what to quantize (targets to weight arguments), the model's dtype and its deviations from SHAPE."""

    name: str
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
    dtype: torch.dtype = torch.float16
    shape: dict[str, Any] = field(default_factory=dict)


SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LINEAR = ("Linear",)
W8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
W4 = {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True}
W4_ASYMMETRIC = {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False}
W3 = {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": True}
W3_ASYMMETRIC = {"num_bits": 3, "strategy": "channel", "symmetric": False}
# No size is a multiple of 32 here, so that rows of words and of zero points end in padding bits.
ODD_SHAPE = {"hidden_size": 72, "intermediate_size": 100, "num_key_value_heads": 2, "attention_bias": True}

SAMPLES = (
    Sample("w4-g64", ((LINEAR, W4),)),
    Sample("w4-g128-asymmetric", ((LINEAR, W4_ASYMMETRIC),)),
    Sample("w3-g64-bf16", ((LINEAR, W3),), torch.bfloat16),
    Sample("w8-channel", ((LINEAR, W8),)),
    Sample("mixed", ((("re:.*down_proj$",), W8), (("re:.*self_attn.*_proj$", "re:.*mlp.(gate|up)_proj$"), W4))),
    Sample("w3-channel-asymmetric-odd-bf16", ((LINEAR, W3_ASYMMETRIC),), torch.bfloat16, ODD_SHAPE),
)


def random_model(sample: Sample) -> LlamaForCausalLM:
    """A seeded Llama whose matrices hold one zero row and one zero group: the edge cases of a scale."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | sample.shape)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.02)
        layer = model.model.layers[0]
        layer.self_attn.k_proj.weight[3] = 0
        layer.mlp.down_proj.weight[5, :64] = 0
    return model.to(sample.dtype)


def quantize(sample: Sample, folder: Path) -> None:
    """Write the sample as llm-compressor writes it, without the files that no loader reads."""
    with tempfile.TemporaryDirectory() as dense:
        # oneshot validates the folder that a model came from, so the model has to come from one.
        random_model(sample).save_pretrained(dense)
        model = LlamaForCausalLM.from_pretrained(dense, dtype="auto")
        config_groups = {
            f"group_{i}": QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**arguments))
            for i, (targets, arguments) in enumerate(sample.groups)
        }
        oneshot(model=model, recipe=QuantizationModifier(config_groups=config_groups, ignore=["lm_head"]))
        model.save_pretrained(folder, save_compressed=True)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def dequantized_weights(
    folder: Path, model: LlamaForCausalLM, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Module name to the weight [out, in] that compressed-tensors makes of the files in ``folder``.

    It computes in the dtype of the scale, which ``dtype`` replaces, as transformers does for the dtype it loads in.
    """
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(
        {key: value for key, value in stored.items() if key not in ("sparsity_config", "transform_config")}
    )
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for scheme in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for name, _ in match_named_modules(model, scheme.targets, config.ignore):
            prefix = f"{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state["weight_scale"] = state["weight_scale"].to(dtype or state["weight_scale"].dtype)
            weights[name] = compressor.decompress(state, scheme)["weight"].contiguous()
    return weights


def digest(weight: torch.Tensor) -> str:
    """SHA-256 of the raw little-endian bytes; adding zero first makes -0 and 0 the same."""
    return hashlib.sha256((weight + 0).view(torch.uint8).numpy().tobytes()).hexdigest()


def write_expectations(sample: Sample, out: Path) -> None:
    """Write what a correct reader gets from the folder: digests of the weights, and logits."""
    folder = out / sample.name
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | sample.shape)))
    weights = dequantized_weights(folder, model)
    state = load_file(folder / "model.safetensors")
    exact = dequantized_weights(folder, model, torch.float32)
    state |= {f"{name}.weight": weight for name, weight in exact.items()}
    model.load_state_dict({name: state[name].float() for name in model.state_dict()})
    input_ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        logits = model.eval()(input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, out / f"{sample.name}.logits.safetensors")
    expected = {
        "made_with": {package: version(package) for package in PACKAGES},
        "weights": {
            name: {
                "dtype": str(weight.dtype).removeprefix("torch."),
                "shape": list(weight.shape),
                "sha256": digest(weight),
            }
            for name, weight in sorted(weights.items())
        },
    }
    (out / f"{sample.name}.weights.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make test samples with llm-compressor.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write to (default: %(default)s)")
    out = parser.parse_args().out
    for sample in SAMPLES:
        folder = out / sample.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        quantize(sample, folder)
        write_expectations(sample, out)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
