"""A model that runs one layer at a time computes what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from importance_samples import ARCHITECTURES, LAYERS, VOCAB, hidden_states, load_model, save_model, some_tokens
from qtale.checkpoint import open_folder
from qtale.errors import CheckpointError, UnsupportedError
from qtale.layerwise.model import LayeredModel


def layered_states(model: LayeredModel, tokens: np.ndarray) -> list[torch.Tensor]:
    found = [model.embed(tokens)]
    for index in range(model.num_layers):
        with model.layer(index) as layer:
            found.append(layer(found[-1]))
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_hidden_states_norm_and_logits_equal_the_whole_model(kind: str, tmp_path: Path) -> None:
    path, tokens = save_model(tmp_path / kind, kind), some_tokens()
    whole, model = load_model(path), LayeredModel(open_folder(path))
    expected = hidden_states(whole, tokens)
    found = layered_states(model, tokens)
    assert len(found) == len(expected) == LAYERS + 1
    for got, want in zip(found, expected, strict=True):
        # Sums of float32 are in another order, and what they cancel from is as large as the largest state.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * float(want.abs().max()))
    with torch.no_grad():
        logits, normed = whole(torch.from_numpy(tokens)).logits, whole.model.norm(expected[-1])
    with model.head() as head:
        torch.testing.assert_close(head(found[-1]), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.normed(found[-1][:, 3]), normed[:, 3], rtol=1e-5, atol=1e-5)


def test_batches_of_other_sizes_get_their_own_masks(tmp_path: Path) -> None:
    path, tokens = save_model(tmp_path / "gemma2", "gemma2"), some_tokens(5)
    model = LayeredModel(open_folder(path))
    together = layered_states(model, tokens)[-1]
    for start, stop in ((0, 2), (2, 5)):
        torch.testing.assert_close(layered_states(model, tokens[start:stop])[-1], together[start:stop])


def test_only_the_layer_in_use_holds_weights(tmp_path: Path) -> None:
    model = LayeredModel(open_folder(save_model(tmp_path / "llama")))
    assert all(weight.is_meta for index in range(LAYERS) for weight in model.linears(index).values())
    with model.layer(1):
        assert [model.linears(i)[f"model.layers.{i}.mlp.up_proj"].is_meta for i in range(3)] == [True, False, True]
    assert all(weight.is_meta for weight in model.linears(1).values())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    path, tokens = save_model(tmp_path / "half", "llama", torch.bfloat16), some_tokens()
    model = LayeredModel(open_folder(path))
    assert model.scale_dtype == "bfloat16"
    assert model.matrix("embed").dtype == torch.bfloat16
    expected = hidden_states(load_model(path), tokens)[-1]
    torch.testing.assert_close(layered_states(model, tokens)[-1], expected, rtol=1e-5, atol=1e-5)


def test_matrices_of_tied_and_untied_models(tmp_path: Path) -> None:
    tied = LayeredModel(open_folder(save_model(tmp_path / "tied")))
    assert torch.equal(tied.matrix("embed"), tied.matrix("lm_head"))
    path = save_model(tmp_path / "untied", "qwen3")
    free, whole = LayeredModel(open_folder(path)), load_model(path)
    assert torch.equal(free.matrix("embed"), whole.model.embed_tokens.weight)
    assert torch.equal(free.matrix("lm_head"), whole.lm_head.weight)
    assert free.matrix("lm_head").shape == (VOCAB, free.hidden_size)
    assert not torch.equal(free.matrix("embed"), free.matrix("lm_head"))


def edited(path: Path, **changes: torch.Tensor | None) -> LayeredModel:
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return LayeredModel(open_folder(path))


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    model = edited(save_model(tmp_path / "a"), **{"model.layers.1.mlp.up_proj.weight": None})
    with (
        pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up"),
        model.layer(1),
    ):
        pass
    model = edited(save_model(tmp_path / "b"), **{"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)})
    with (
        pytest.raises(CheckpointError, match=r"shape \[3, 3\], but config\.json asks for \[96"),
        model.layer(0),
    ):
        pass
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.norm\.weight'"):
        edited(save_model(tmp_path / "c"), **{"model.norm.weight": None})


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match="no list of 2 decoder layers named 'layers'"):
        LayeredModel(open_folder(tmp_path / "gpt2"))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedError, match="no causal language model of type 't5'"):
        LayeredModel(open_folder(tmp_path / "t5"))
    bert = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="no list of 1 decoder layers"):
        LayeredModel(open_folder(tmp_path / "bert"))
