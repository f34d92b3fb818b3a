"""Quantized folders as ordinary transformers models whose Linears are qtale's, and models quantized in place."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale import names
from qtale.checkpoint.architecture import build_on_meta, decoder_config, short
from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.format.config import build_config
from qtale.format.tensors import PackedModule, packed_modules, read_module
from qtale.integrations.routing import attach_routing
from qtale.routing import read_routing
from qtale.spec import QuantSpec, check_compute
from qtale.tensors import FLOATS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def load_torch(
    path: str | Path,
    *,
    compute: str = "int8",
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """An ordinary transformers causal language model with :class:`qtale.nn.QLinear` in the place of packed Linears.

    ``path`` is a folder or hub name in compressed-tensors ``pack-quantized`` form, or a dense one, which loads as it
    is. ``compute`` is the mode of the QLinears: with ``"float"`` logits are those of the dequantized weights but for
    float32 rounding, with ``"int8"`` they differ by about 0.5 % of their range (root mean square; single ones by 8 %),
    with ``"int16"`` by a 250th of that.
    ``dtype`` is that of activations and of everything that is not packed: a torch dtype or its name, by default the
    one that the folder was stored in. Of these, float32 is the most exact and reads prompts fastest on most CPUs;
    16 bits halve the memory of embeddings and head. One tensor is read at a time: memory peaks near the model's size.

    The model is in eval mode, works in ``generate`` and pipelines, passes gradients to its inputs, and
    ``save_pretrained`` writes a compressed-tensors folder again. Raises CheckpointError for broken folders,
    UnsupportedError for what transformers has no causal language model for and for devices other than the CPU.
    """
    if device != "cpu":
        raise UnsupportedError(f"load_torch: device {device!r} is not supported; this version computes on 'cpu'.")
    check_compute("load_torch", compute)
    folder = open_folder(path)
    packed = packed_modules(folder)
    if not packed:
        return _routed(_load_dense(folder, dtype), folder)
    model = build_empty(folder, chosen_dtype(folder, dtype))
    _insert_packed(model, folder, packed, compute)
    read_dense_tensors(model, folder, packed)
    model.tie_weights()
    check_complete(model, folder)
    model.config.quantization_config = dict(folder.config["quantization_config"])
    return _routed(model.eval(), folder)


def _routed(model: PreTrainedModel, folder: ModelFolder) -> PreTrainedModel:
    """The model with the routers that lie beside it, in their dense form: nothing is saved, logits are the engine's."""
    hidden = folder.config.get("hidden_size")
    count = folder.config.get("num_hidden_layers")
    if type(hidden) is int and type(count) is int:
        routing = read_routing(folder.path, count, hidden)
        if routing is not None:
            attach_routing(model, routing)
    return model


@dataclass(frozen=True)
class InPlaceReport:
    """What :func:`quantize_model_` did. ``bytes_before`` and ``bytes_after`` count all parameters of the model.

    ``bits_per_weight`` is over the quantized layers, scales and zero points included.
    """

    modules: tuple[str, ...]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int


def quantize_model_(
    model: PreTrainedModel, spec: QuantSpec | None = None, *, compute: str = "int8", progress: bool = True
) -> InPlaceReport:
    """Quantize the Linears of a model's decoder blocks in place, by rounding to nearest; the head stays as it is.

    The layers are those that :func:`qtale.quantize` would take, with the same codes. Raises InputError for weights that
    cannot be quantized (the model then keeps what was done so far) and UnsupportedError where nothing qualifies.
    """
    from tqdm.auto import tqdm

    from qtale.nn import QLinear, linear_names, replace

    spec = spec or QuantSpec()
    linears = {name: model.get_submodule(name) for name in linear_names(model)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    chosen = [name for name, shape in shapes.items() if names.role(f"{name}.weight", shape) == names.LINEAR]
    if not chosen:
        raise UnsupportedError(
            f"quantize: {type(model).__name__} has no Linear layers inside decoder blocks that qtale knows by name."
        )
    specs = {name: spec.resolve(name, shapes[name][1]) for name in chosen}
    del linears
    before = _parameter_bytes(model)
    with tqdm(total=len(chosen), desc="quantizing", unit="layer", delay=1, disable=not progress) as bar:

        def make(name: str, linear: nn.Linear) -> nn.Module:
            bar.update()
            return QLinear.from_linear(linear, specs[name], name=name, compute=compute)

        replace(model, chosen, make)
    packed = sum(_packed_bytes(model.get_submodule(name)) for name in chosen)
    weights = sum(out * in_features for out, in_features in (shapes[name] for name in chosen))
    model.config.quantization_config = build_config(specs, _ignored(model))
    return InPlaceReport(tuple(chosen), 8 * packed / weights, before, _parameter_bytes(model) + packed)


def _ignored(model: nn.Module) -> list[str]:
    from qtale.nn import linear_names

    return linear_names(model)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _packed_bytes(layer: Any) -> int:
    from qtale.nn.packed import packed_shapes

    shapes = packed_shapes((layer.out_features, layer.in_features), layer.spec, layer.scale_dtype)
    return sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise InputError(f"load_torch: dtype {dtype!r} is not supported; use {', '.join(FLOATS)}.")
    return getattr(torch, name)  # type: ignore[no-any-return]


def chosen_dtype(folder: ModelFolder, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype asked for, else the one that the folder was stored in; InputError for one that is not supported."""
    if dtype is not None and dtype != "auto":
        return _torch_dtype(dtype)
    stored = folder.config.get("dtype") or folder.config.get("torch_dtype")
    return _torch_dtype(stored if stored in FLOATS else "float32")


def _load_dense(folder: ModelFolder, dtype: torch.dtype | str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config, chosen = decoder_config(folder, "load_torch"), chosen_dtype(folder, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, config=config, dtype=chosen, use_safetensors=True, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(f"{folder.path}: transformers cannot load it: {short(error)}") from error
    return model


def build_empty(folder: ModelFolder, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers, which no file holds, are computed as usual.

    Raises UnsupportedError for what transformers has no causal language model for.
    """
    config = decoder_config(folder, "load_torch")
    # transformers must not start its own decompression; the caller puts the entry back.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build_on_meta(folder, config, dtype)
    model.name_or_path = model.config.name_or_path = str(folder.path)
    return model


def _insert_packed(model: PreTrainedModel, folder: ModelFolder, packed: dict[str, PackedModule], compute: str) -> None:
    from tqdm.auto import tqdm

    from qtale.nn import QLinear, replace

    def make(name: str, linear: nn.Linear) -> nn.Module:
        module = packed[name]
        if (linear.out_features, linear.in_features) != (module.out_features, module.in_features):
            raise CheckpointError(
                f"{folder.path}: {name} holds [{module.out_features}, {module.in_features}], but the model of "
                f"config.json has [{linear.out_features}, {linear.in_features}] there."
            )
        codes, scale, zero_point = read_module(folder, module)
        bias = f"{name}.bias" if linear.bias is not None else None
        values = folder.torch(bias).to(model.dtype) if bias else None
        layer = QLinear.from_tensors(
            codes, scale, zero_point, num_bits=module.spec.num_bits, bias=values, compute=compute
        )
        bar.update()
        return layer

    ordered = sorted(packed, key=lambda name: folder.shard_of(f"{name}.weight_packed").path.name)
    with tqdm(total=len(packed), desc="loading", unit="layer", leave=False, delay=1) as bar:
        try:
            replace(model, ordered, make)
        except InputError as error:
            raise UnsupportedError(f"{folder.path}: its packed tensors do not fit the model: {error}") from error


def read_dense_tensors(model: PreTrainedModel, folder: ModelFolder, packed: Container[str]) -> None:
    """Give an empty model its tensors from disk, one at a time, but for those of the modules named in ``packed``.

    Raises UnsupportedError for tensors that the model has no place for, CheckpointError for wrong shapes.
    """
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for shard in folder.shards:
        for name in shard.tensors:
            # Old Llama folders store what is a computed buffer today.
            if names.module_of(name) in packed or name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in targets:
                raise UnsupportedError(
                    f"{folder.path}: tensor {name!r} has no place in transformers' {type(model).__name__}."
                )
            _assign(model, name, targets[name], folder)


def _assign(model: PreTrainedModel, name: str, target: torch.Tensor, folder: ModelFolder) -> None:
    import torch

    value = folder.torch(name)
    if value.shape != target.shape:
        raise CheckpointError(
            f"{folder.path}: {name} has shape {list(value.shape)}, but config.json asks for {list(target.shape)}."
        )
    parent, _, leaf = name.rpartition(".")
    value = value.to(target.dtype)
    setattr(
        model.get_submodule(parent),
        leaf,
        torch.nn.Parameter(value, value.is_floating_point()) if isinstance(target, torch.nn.Parameter) else value,
    )


def check_complete(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Raise CheckpointError where parameters have got no values."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder.path}: lacks the tensors {', '.join(missing[:3])}{more}.")
