"""A language model that runs layer by layer: one decoder layer at a time holds weights, in float32.

What surrounds the layers (scaling of embeddings, masks, rotary angles, final norm, soft caps) is done by the forward
of transformers' own model, whose layers only note what they are called with, or hand in given hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale import names, ops
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import STORED_FLOATS, TensorInfo
from qtale.errors import CheckpointError, UnsupportedError
from qtale.layerwise.skeleton import build_skeleton, decoder_layers
from qtale.process import release

if TYPE_CHECKING:
    import torch

Layer = Callable[["torch.Tensor"], "torch.Tensor"]


class LayeredModel:
    """An opened model whose decoder layers are read from disk one by one.

    ``verb`` names in errors what the model is run for. Resident are the final norm and at most one layer in float32; of
    the embedding matrix the rows are read that are asked for.
    """

    def __init__(self, folder: ModelFolder, verb: str = "measure") -> None:
        self.folder, self._verb = folder, verb
        self._model: Any = build_skeleton(folder, verb)
        self._prefix, layers = decoder_layers(self._model, folder)
        self._layers: list[Any] = list(layers)
        self._forwards: list[Callable[..., Any]] = [layer.forward for layer in self._layers]
        self._memory: dict[str, torch.Tensor] = {}
        self._given: torch.Tensor | None = None
        self._first: Any = None
        self._seen: list[dict[str, Any]] = []
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for layer in self._layers:
            layer.forward = partial(self._note, layer is self._layers[0])
            for linear in _linears(layer):
                linear.forward = partial(_multiply, linear)
        self._embedding = self._model.get_input_embeddings()
        self._embedding.padding_idx = None  # rows are renumbered, see embed
        self._embed_name = self._name_of(self._embedding)
        self._embed_shape = self._checked_shape(self._embed_name, self._embedding.weight.shape)
        self._read_surroundings()

    def close(self) -> None:
        """Free what the model holds; without it that waits for Python's collector of cycles."""
        for layer in self._layers:
            for module in (layer, *_linears(layer)):
                module.forward = None
        self._memory.clear()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        return self._embed_shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return self._embed_shape[0]

    @property
    def scale_dtype(self) -> str:
        """The dtype in which quantization scales of this model are kept: that of its stored weights."""
        kind = next(info.dtype for info in self.folder.tensors.values() if info.name.startswith(f"{self._prefix}."))
        return STORED_FLOATS.get(kind, "float32")

    def _name_of(self, module: Any) -> str:
        return next(f"{name}.weight" for name, found in self._model.named_modules() if found is module)

    def _checked(self, name: str) -> TensorInfo:
        if name not in self.folder.tensors:
            raise CheckpointError(f"{self.folder.path}: lacks the tensor {name!r}.")
        dtype = self.folder.tensors[name].dtype
        if dtype not in STORED_FLOATS:
            raise UnsupportedError(
                f"{self.folder.path}: {name} has dtype {dtype}; {self._verb} takes {', '.join(STORED_FLOATS)}."
            )
        return self.folder.tensors[name]

    def _checked_shape(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        stored = self._checked(name).shape
        if stored != tuple(shape):
            raise CheckpointError(
                f"{self.folder.path}: {name} has shape {list(stored)}, but config.json asks for {list(shape)}."
            )
        return stored

    def _stored(self, name: str) -> torch.Tensor:
        return self.folder.torch(self._checked(name).name)

    def _float32(self, name: str, shape: torch.Size, place: str = "") -> torch.Tensor:
        """A tensor in float32, in the memory that was given to ``place`` before, if it is of the same shape."""
        import torch

        self._checked_shape(name, shape)
        value = self._stored(name)
        if not place:
            return value.float()
        # New memory for every layer would leave holes, and the process would grow with the depth of the model.
        if place not in self._memory or self._memory[place].shape != shape:
            self._memory[place] = torch.empty(shape)
        return self._memory[place].copy_(value)

    def _read_surroundings(self) -> None:
        head = self._model.get_output_embeddings()
        for name, parameter in self._model.named_parameters():
            owner = self._model.get_submodule(names.module_of(name))
            if not name.startswith(f"{self._prefix}.") and owner is not self._embedding and owner is not head:
                _set(self._model, name, self._float32(name, parameter.shape))

    def matrix(self, kind: str) -> torch.Tensor:
        """The matrix [vocab, hidden] of kind "embed" or "lm_head" in its stored dtype; one matrix where they are tied.

        Raises CheckpointError where an untied model's file lacks its head.
        """
        head = self._model.get_output_embeddings()
        if kind == "embed" or head is None:
            return self._stored(self._embed_name)
        name = self._name_of(head)
        tied = self._model.config.get_text_config().tie_word_embeddings
        return self._stored(self._embed_name if tied and name not in self.folder.tensors else name)

    def _note(self, is_first: bool, hidden_states: torch.Tensor, *others: Any, **arguments: Any) -> torch.Tensor:
        if others:
            raise UnsupportedError(
                f"{self.folder.path}: {type(self._model).__name__} gives its layers more than hidden states, which "
                f"{self._verb} cannot follow; use a model built as Llama is."
            )
        self._seen.append(arguments)
        if not is_first:
            return hidden_states
        self._first = hidden_states
        return hidden_states if self._given is None else self._given

    def _surround(self, part: Any, ids: torch.Tensor, given: torch.Tensor | None) -> Any:
        self._given, self._seen = given, []
        try:
            return part(input_ids=ids, use_cache=False)
        finally:
            self._given = None

    def embed(self, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        """What enters the first layer, float32 [n, length, hidden], for token numbers [n, length]."""
        import torch

        unique, inverse = np.unique(tokens, return_inverse=True)
        rows = self.folder.torch_rows(self._embed_name, unique).float()
        self._embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        with torch.no_grad():
            self._surround(self._model.base_model, torch.from_numpy(inverse.reshape(tokens.shape)), None)
        return self._first  # type: ignore[no-any-return]

    def _ids(self, count: int, length: int) -> torch.Tensor:
        """Token numbers that stand for any: what they embed to is not used."""
        import torch

        self._embedding.weight = torch.nn.Parameter(torch.zeros(1, self.hidden_size), requires_grad=False)
        return torch.zeros(count, length, dtype=torch.int64)

    def _arguments_of(self, count: int, length: int) -> list[dict[str, Any]]:
        if (count, length) not in self._arguments:
            self._surround(self._model.base_model, self._ids(count, length), None)
            self._arguments[count, length] = self._seen
        return self._arguments[count, length]

    @contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """Read decoder layer ``index`` and yield it as a function of hidden states float32 [n, length, hidden].

        Raises CheckpointError for tensors that are missing or do not fit config.json.
        """
        import torch

        module = self._layers[index]
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        for name, shape in shapes.items():
            _set(module, name, self._float32(f"{self._prefix}.{index}.{name}", shape, name))

        def call(hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                arguments = self._arguments_of(hidden.shape[0], hidden.shape[1])[index]
            result = self._forwards[index](hidden, **arguments)
            return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]

        try:
            yield call
        finally:
            for name, shape in shapes.items():
                _set(module, name, torch.empty(shape, device="meta"))
            # glibc keeps what lies between small objects, more with every layer.
            release()

    def parts(self, index: int) -> dict[str, torch.nn.Module]:
        """The modules inside layer ``index`` by full name; they hold weights while the layer is read."""
        return {f"{self._prefix}.{index}.{name}": part for name, part in self._layers[index].named_modules() if name}

    def linears(self, index: int) -> dict[str, torch.nn.Parameter]:
        """The weights [out, in] of layer ``index`` that quantization would take, by module name."""
        found = {}
        for name, parameter in self._layers[index].named_parameters():
            full = f"{self._prefix}.{index}.{name}"
            if names.role(full, parameter.shape) == names.LINEAR:
                found[names.module_of(full)] = parameter
        if not found:
            raise UnsupportedError(f"{self.folder.path}: layer {index} has no Linear weights that qtale knows by name.")
        return found

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's final norm of hidden states [rows, hidden]."""
        import torch

        with torch.no_grad():
            ids = self._ids(hidden.shape[0], 1)
            return self._surround(self._model.base_model, ids, hidden.unsqueeze(1)).last_hidden_state[:, 0]  # type: ignore[no-any-return]

    @contextmanager
    def head(self) -> Iterator[Layer]:
        """Read the head in float32 and yield the function from the last hidden states to logits [n, length, vocab]."""
        import torch

        head = self._model.get_output_embeddings()
        head.forward = partial(_multiply, head)
        head.weight = torch.nn.Parameter(self.matrix("lm_head").float(), requires_grad=False)
        try:
            yield lambda hidden: self._surround(self._model, self._ids(*hidden.shape[:2]), hidden).logits
        finally:
            head.forward = None  # no cycle keeps the model
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device="meta"), requires_grad=False)


def _linears(layer: torch.nn.Module) -> list[Any]:
    import torch

    return [module for module in layer.modules() if type(module) is torch.nn.Linear]


def _multiply(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What a Linear gives, by our float32 product; under autocast by torch's, which follows it."""
    import torch

    if torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, linear.weight, linear.bias)
    return ops.matmul(x, linear.weight, linear.bias)  # type: ignore[no-any-return]


def _set(module: Any, name: str, value: torch.Tensor) -> None:
    import torch

    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
