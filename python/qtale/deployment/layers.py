"""The Linears of a planned model: the spec of each, and making one from the weights on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale import names
from qtale.checkpoint.folder import ModelFolder
from qtale.deployment.running import Specs
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.format.config import build_config
from qtale.ptq.worklist import HEAD, list_work, planned_overrides
from qtale.spec import QuantSpec, ResolvedSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from qtale.planner.plan import Plan

AS_STORED = 16


def bits_of(spec: ResolvedSpec | None) -> int:
    """The bits of a spec; 16 for None, which leaves a weight as stored."""
    return AS_STORED if spec is None else spec.num_bits


def specs_of(folder: ModelFolder, plan: Plan) -> dict[str, ResolvedSpec | None]:
    """Module → spec for every Linear that a plan decides on, in model order; None where it stays as stored.

    Raises InputError where the plan is for another model or does not fit its layers, UnsupportedError for models that
    cannot be quantized.
    """
    asked = planned_overrides(folder, plan)
    quantized = any(spec is not None for spec in asked.values())
    rows = list_work(folder, QuantSpec(), asked).rows if quantized else {}
    has_head = f"{HEAD}.weight" in folder.tensors and folder.config.get("tie_word_embeddings") is not True
    modules = sorted({*asked, *([HEAD] if has_head else [])}, key=names.model_order)
    return {module: rows[module].spec if module in rows else None for module in modules}


def build_model(folder: ModelFolder, specs: Specs, compute: str, progress: bool) -> PreTrainedModel:
    """The running model of a folder in eval mode, one tensor read at a time, its Linears as ``specs`` say.

    Raises as :func:`make_layer` does, and as :func:`qtale.load_torch` for folders that do not fit transformers.
    """
    from tqdm.auto import tqdm

    from qtale.integrations.transformers import build_empty, check_complete, chosen_dtype, read_dense_tensors
    from qtale.nn import set_module

    model = build_empty(folder, chosen_dtype(folder, None))
    on_disk = sorted(specs, key=lambda name: (folder.shard_of(f"{name}.weight").path.name, _start(folder, name)))
    for name in tqdm(on_disk, desc="deploying", unit="layer", leave=False, delay=1, disable=not progress):
        old = _linear(model, name, folder)
        bias = None if old.bias is None else _bias(folder, name, model.dtype)
        set_module(model, name, make_layer(folder, name, specs[name], old, bias, model.dtype, compute))
    read_dense_tensors(model, folder, specs)
    model.tie_weights()
    check_complete(model, folder)
    mark_config(model, specs)
    return model.eval()


def make_layer(
    folder: ModelFolder,
    name: str,
    spec: ResolvedSpec | None,
    old: Any,
    bias: nn.Parameter | None,
    dtype: torch.dtype,
    compute: str,
) -> nn.Module:
    """The module to put in the place of ``old``: quantized from the weight on disk, or for no spec a Linear of it.

    Raises CheckpointError for a weight that cannot be read, has another shape than ``old`` or holds NaN or infinities.
    """
    import torch

    from qtale.nn import QLinear
    from qtale.ptq.rtn import round_to_nearest

    weight = folder.torch(f"{name}.weight")
    if weight.shape != (old.out_features, old.in_features):
        raise CheckpointError(
            f"{folder.path}: {name}.weight has shape {list(weight.shape)}, but the model of config.json has "
            f"[{old.out_features}, {old.in_features}] there."
        )
    if spec is None:
        linear = torch.nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        # Products may depend on the alignment of their operands, so every weight lies where torch would put it.
        linear.weight = torch.nn.Parameter(weight.to(dtype, copy=True))
        linear.register_parameter("bias", bias)
        return linear.train(old.training)
    try:
        codes, scale, zero_point = round_to_nearest(weight, spec)
    except InputError as error:
        raise CheckpointError(f"{folder.path}: {name}.weight cannot be quantized: {error}") from error
    del weight
    layer = QLinear.from_tensors(codes, scale, zero_point, num_bits=spec.num_bits, bias=bias, compute=compute)
    return layer.train(old.training)


def mark_config(model: PreTrainedModel, specs: Specs) -> None:
    """Make the model's config say how it is quantized now, so that save_pretrained writes a folder that loads."""
    from qtale.nn import linear_names

    quantized = {name: spec for name, spec in specs.items() if spec is not None}
    if quantized:
        model.config.quantization_config = build_config(quantized, linear_names(model))
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _start(folder: ModelFolder, name: str) -> int:
    return folder.tensors[f"{name}.weight"].start


def _linear(model: PreTrainedModel, name: str, folder: ModelFolder) -> nn.Linear:
    import torch

    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedError(
            f"{folder.path}: {name} has no place in transformers' {type(model).__name__}."
        ) from error
    if type(module) is not torch.nn.Linear:
        raise UnsupportedError(
            f"{folder.path}: {name} is a {type(module).__name__} in transformers' {type(model).__name__}; deploy takes "
            "models made of nn.Linear, as the Llama family's are."
        )
    return module


def _bias(folder: ModelFolder, name: str, dtype: torch.dtype) -> nn.Parameter:
    import torch

    return torch.nn.Parameter(folder.torch(f"{name}.bias").to(dtype, copy=True))
