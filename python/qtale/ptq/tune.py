"""End-to-end tuning: codes stay, scales and norms move until the predictions come near those of the dense model.

The loss is the Kullback-Leibler divergence from the dense model's predictions on the calibration sequences, as in
EfficientQAT's end-to-end phase (Chen et al., arXiv 2407.11062, section 3.3), which trains scales on labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qtale import names
from qtale.checkpoint.architecture import build_on_meta, decoder_config
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import STORED_FLOATS
from qtale.format.tensors import PACKED, SCALE, ZERO_POINT
from qtale.layerwise.tokens import Tokens
from qtale.ptq.products import AUTO, products
from qtale.ptq.tuning_state import TuningState
from qtale.ptq.worklist import LayerRow

if TYPE_CHECKING:
    import torch
    from torch import nn

# Tokens whose predictions over the whole vocabulary exist at once.
_HEAD_TOKENS = 512
_BETAS = (0.9, 0.95)
_WARMUP, _LAST = 8, 0.05


@dataclass(frozen=True)
class TuneOptions:
    """``steps`` of Adam on ``sequences`` each, in an order drawn with ``seed``.

    The learning rate, of relative changes, rises over 8 steps to ``rate`` and falls as a cosine to a twentieth of it.
    ``compute_dtype`` is that of :class:`qtale.ptq.options.SolverOptions`.
    """

    steps: int
    seed: int
    sequences: int = 2
    rate: float = 2e-3
    compute_dtype: str = AUTO


@dataclass(frozen=True)
class Tuned:
    """Tensors that changed, by name and as they will be stored, and the divergence in nats per token of every step."""

    tensors: dict[str, torch.Tensor]
    divergence: tuple[float, ...]


def needed_bytes(folder: ModelFolder, seq_len: int, options: TuneOptions) -> int:
    """What tuning takes beyond what Python and torch do: the dense model, codes, weights of a step and activations."""
    parameters = sum(info.numel for info in folder.tensors.values())
    tokens = options.sequences * seq_len
    layers = int(folder.config["num_hidden_layers"])
    wide = 6 * int(folder.config["hidden_size"]) + 4 * int(folder.config["intermediate_size"])
    vocabulary = int(folder.config["vocab_size"])
    return parameters * (4 + 2 + 4) + tokens * layers * wide * 4 + min(tokens, _HEAD_TOKENS) * vocabulary * 16


def tune(
    folder: ModelFolder,
    rows: Mapping[str, LayerRow],
    solved: Mapping[str, torch.Tensor],
    tokens: Tokens,
    options: TuneOptions,
    done: Callable[[float], object],
    kept: TuningState | None = None,
) -> Tuned:
    """Tune the scales of ``rows`` and all norms on ``tokens`` [sequences, length]; ``done`` is told each step's loss.

    ``solved`` holds the packed tensors of the rows and norms that were changed already. The whole model is in memory,
    see :func:`needed_bytes`. With ``kept``, a run that was killed goes on from what lies there.
    """
    import torch

    dense, student = _model(folder, {}), _model(folder, solved)
    _share(dense, student)
    changes = _replace(student, rows, solved, folder)
    optimizer = torch.optim.Adam(changes.values(), lr=options.rate, betas=_BETAS)
    losses = [] if kept is None else kept.restore(changes, optimizer)
    for loss in losses:
        done(loss)
    for step, sequences in enumerate(_order(len(tokens), options)):
        if step < len(losses):
            continue
        for group in optimizer.param_groups:
            group["lr"] = options.rate * _schedule(step, options.steps)
        optimizer.zero_grad()
        losses.append(_step(dense, student, torch.from_numpy(tokens[sequences]), options.compute_dtype))
        torch.nn.utils.clip_grad_norm_(changes.values(), 1.0)
        optimizer.step()
        done(losses[-1])
        if kept is not None:
            kept.keep(changes, optimizer, losses)
    return Tuned(_results(student, changes, folder), tuple(losses))


def _order(count: int, options: TuneOptions) -> Iterator[Any]:
    """The sequences of every step: all in a new order, again and again."""
    draw = np.random.default_rng(options.seed)
    size = min(options.sequences, count)
    waiting: list[int] = []
    for _ in range(options.steps):
        if len(waiting) < size:
            waiting += draw.permutation(count).tolist()
        yield waiting[:size]
        del waiting[:size]


def _schedule(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARMUP) * (_LAST + (1 - _LAST) * cosine)


def _step(dense: nn.Module, student: nn.Module, ids: torch.Tensor, compute_dtype: str) -> float:
    """The mean divergence over the tokens; gradients are added to the student's changes."""
    import torch

    with products(compute_dtype):
        with torch.no_grad():
            wanted = _hidden(dense, ids)
        given = _hidden(student, ids)
        leaf = given.detach().requires_grad_()
        total = 0.0
        for start in range(0, len(leaf), _HEAD_TOKENS):
            piece = slice(start, start + _HEAD_TOKENS)
            total += _divergence(dense, wanted[piece], leaf, piece)
    given.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return total


def _hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What enters the head, [tokens, hidden]."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]


def _divergence(dense: Any, wanted: torch.Tensor, leaf: torch.Tensor, piece: slice) -> float:
    """This piece's share of the mean divergence; its gradient is added to that of ``leaf``."""
    import torch

    head = dense.get_output_embeddings()
    with torch.no_grad():
        expected = torch.log_softmax(head(wanted).float(), -1)
    found = torch.log_softmax(head(leaf[piece]).float(), -1)
    loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / len(leaf)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _model(folder: ModelFolder, replaced: Mapping[str, torch.Tensor]) -> Any:
    """The model in float32 without gradients, some tensors ``replaced``; weights that are packed there stay away."""
    import torch

    model = build_on_meta(folder, decoder_config(folder, "quantize"), torch.float32).eval()
    for name, parameter in model.named_parameters():
        packed = f"{names.module_of(name)}.{PACKED}" in replaced and name.endswith(".weight")
        # A head that is tied to the embedding has no tensor of its own.
        if packed or name not in folder.tensors:
            continue
        value = replaced[name] if name in replaced else folder.torch(name)
        owner = model.get_submodule(names.module_of(name))
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value.float().reshape(parameter.shape), False))
    model.tie_weights()
    return model


def _share(dense: Any, student: Any) -> None:
    """One embedding and one head for both models."""
    student.set_input_embeddings(dense.get_input_embeddings())
    student.set_output_embeddings(dense.get_output_embeddings())


def _replace(
    student: Any, rows: Mapping[str, LayerRow], solved: Mapping[str, torch.Tensor], folder: ModelFolder
) -> dict[str, torch.nn.Parameter]:
    """Put codes with tunable scales into the student; returns its parameters, relative changes, by tensor name."""
    from qtale.nn import replace
    from qtale.ptq.tunable import RelativeChange, TunableLinear

    def make(name: str, linear: Any) -> nn.Module:
        zero_point = solved.get(f"{name}.{ZERO_POINT}")
        packed = (solved[f"{name}.{PACKED}"], solved[f"{name}.{SCALE}"], zero_point)
        return TunableLinear.from_packed(rows[name], packed, linear.bias)

    replace(student, list(rows), make)
    changes = {f"{name}.{SCALE}": student.get_submodule(name).change for name in rows}
    for name, parameter in list(student.named_parameters()):
        if name.endswith(".weight") and names.role(name, parameter.shape) == names.NORM:
            module = student.get_submodule(names.module_of(name))
            changes[name] = RelativeChange.on_weight_of(module)
    return changes


def _results(student: Any, changes: Mapping[str, torch.Tensor], folder: ModelFolder) -> dict[str, torch.Tensor]:
    import torch

    found = {}
    for name in changes:
        module = student.get_submodule(names.module_of(name))
        if name.endswith(f".{SCALE}"):
            found[name] = module.tuned_scale()
        else:
            found[name] = module.weight.detach().to(getattr(torch, STORED_FLOATS[folder.tensors[name].dtype]))
    return found
