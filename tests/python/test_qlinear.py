"""QLinear: what it computes, its portable state, moves between dtypes and devices, and swapping it into models."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtale import QuantSpec, _core, ops
from qtale.errors import InputError, UnsupportedError
from qtale.nn import QLinear, linear_names, replace, set_module
from qtale.spec import ResolvedSpec

GROUPS: tuple[tuple[int | str, bool], ...] = ((32, True), ("channel", False))
SPECS = [QuantSpec(bits, group, symmetric) for bits in (2, 3, 4, 8) for group, symmetric in GROUPS]


def layer_of(spec: QuantSpec, bias: bool = True, dtype: torch.dtype = torch.float32, compute: str = "float") -> QLinear:
    torch.manual_seed(5)
    return QLinear.from_linear(nn.Linear(96, 43, bias=bias).to(dtype), spec, compute=compute)


def same_weight(a: QLinear, b: QLinear) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.packed_state().values(), b.packed_state().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_computes_with_the_dequantized_weight(spec: QuantSpec, dtype: torch.dtype) -> None:
    layer = layer_of(spec, dtype=dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    assert layer.bias is not None
    exact = nn.functional.linear(x.double(), layer.dequantize(torch.float32).double(), layer.bias.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    layer.compute = "int8"
    rounded = layer(x)
    assert not torch.equal(rounded, y)
    assert (rounded.double() - exact).abs().max() < 0.03 * exact.abs().max()


def test_from_linear_rounds_as_quantize_does_and_leaves_the_linear_alone() -> None:
    linear = nn.Linear(256, 16)
    before = copy.deepcopy(linear.state_dict())
    layer = QLinear.from_linear(linear, QuantSpec(4, 64, False))
    codes, scale, zero_point = ops.quantize(linear.weight, 4, 64, False)
    assert torch.equal(layer.dequantize(), ops.dequantize(codes, scale, zero_point))
    layer.half()
    assert all(torch.equal(before[key], value) for key, value in linear.state_dict().items())
    assert QLinear.from_linear(linear).spec == ResolvedSpec(4, 128, True)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_state_dict_is_compressed_tensors_and_round_trips(spec: QuantSpec, device: str, assign: bool) -> None:
    layer = layer_of(spec, bias=device == "cpu")
    state = layer.state_dict()
    names = {"weight_packed", "weight_scale", "weight_shape"} | (set() if spec.symmetric else {"weight_zero_point"})
    assert set(state) == names | ({"bias"} if device == "cpu" else set())
    assert state["weight_packed"].shape == (43, 96 * spec.num_bits // 32)
    assert state["weight_shape"].tolist() == [43, 96]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = QLinear(96, 43, spec, bias=device == "cpu", compute="float", device=device)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_copies_and_pickles_are_independent_and_equal(spec: QuantSpec) -> None:
    layer, x = layer_of(spec), torch.randn(3, 96)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.prepacked.data_ptr() != layer.prepacked.data_ptr()
        assert torch.equal(other(x), layer(x))
        assert (other.spec, other.compute, other.training) == (layer.spec, layer.compute, layer.training)


def test_a_pickle_holds_the_portable_form_only() -> None:
    state = layer_of(QuantSpec(4, 32)).__getstate__()
    assert state["_buffers"]["prepacked"] is None
    assert set(state["_packed"]) == {"weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_another_instruction_set_prepacks_again(compute: str) -> None:
    layer, x = layer_of(QuantSpec(4, 32), compute=compute), torch.randn(3, 96)
    before, expected = _core.cpu_isa(), layer(x)
    try:
        for isa in _core.cpu_isas():
            _core.set_cpu_isa(isa)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(layer.dequantize(), layer_of(QuantSpec(4, 32)).dequantize())
    finally:
        _core.set_cpu_isa(before)


def test_the_weight_is_in_memory_once() -> None:
    layer = layer_of(QuantSpec(8, "channel"), bias=False)
    assert not list(layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["prepacked"]
    padded_rows = 64
    assert layer.prepacked.numel() <= padded_rows * (96 + 4) + 64


def test_moves_between_dtypes_keep_the_codes() -> None:
    layer = layer_of(QuantSpec(4, 32))
    weight = layer.dequantize()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
        assert torch.equal(layer.dequantize(), weight)
        assert layer(torch.randn(2, 96).to(dtype)).dtype == dtype
    with pytest.raises(InputError, match="float64"):
        layer.double()(torch.randn(2, 96).double())


def test_meta_works_without_data() -> None:
    layer = layer_of(QuantSpec(4, 32)).to("meta")
    assert layer(torch.empty(3, 96, device="meta")).shape == (3, 43)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert copy.deepcopy(layer).prepacked.is_meta
    with pytest.raises(InputError, match="without data"):
        layer.dequantize()
    with pytest.raises(InputError, match=r"x is on cpu, the weight on meta"):
        layer(torch.randn(3, 96))
    empty = layer.to_empty(device="cpu")
    empty.prepacked.zero_()  # memory as it comes could hold an earlier weight
    with pytest.raises(InputError, match="prepack"):
        empty(torch.randn(3, 96))


def test_a_device_without_kernels_is_refused_and_nothing_moves() -> None:
    layer = layer_of(QuantSpec(4, 32))
    with pytest.raises(UnsupportedError, match="QLinear: cannot be moved"):
        layer.to("cuda")
    assert layer(torch.randn(2, 96)).shape == (2, 43)


def test_gradients_reach_inputs_and_bias() -> None:
    layer, x = layer_of(QuantSpec(4, 32)), torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias is not None
    assert x.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 96))
    torch.testing.assert_close(layer.bias.grad, torch.full((43,), 2.0))


def test_it_compiles_whole() -> None:
    model = nn.Sequential(layer_of(QuantSpec(4, 32)), nn.ReLU())
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_repr_says_what_it_is() -> None:
    assert repr(layer_of(QuantSpec(3, 32, False), compute="int8")) == (
        "QLinear(in_features=96, out_features=43, bias=True, bits=3, group_size=32, asymmetric, compute=int8)"
    )


def test_states_that_do_not_fit_are_refused() -> None:
    state = layer_of(QuantSpec(4, 32)).state_dict()
    with pytest.raises(RuntimeError, match=r"weight_packed is torch.int32 \[43, 12\], but 8 bits of \[43, 96\]"):
        QLinear(96, 43, QuantSpec(8, 32)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_zero_point"):
        QLinear(96, 43, QuantSpec(4, 32, False)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight_shape holds \[43, 95\]; this layer is \[43, 96\]"):
        QLinear(96, 43, QuantSpec(4, 32)).load_state_dict({**state, "weight_shape": torch.tensor([43, 95])})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        QLinear(96, 43, QuantSpec(4, 32)).load_state_dict({**state, "weight": torch.zeros(43, 96)})


LINEAR = nn.Linear(96, 8)
CODES, SCALE = torch.zeros(8, 96, dtype=torch.int8), torch.ones(8, 3)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "compute": (lambda: QLinear(96, 8, compute="int4"), "compute 'int4' is not a mode"),
    "group": (lambda: QLinear.from_linear(LINEAR, QuantSpec(4, 128), name="up"), "up: in_features 96 is no.*: 32"),
    "bits": (lambda: QLinear.from_linear(LINEAR, ResolvedSpec(5, 32, True)), "num_bits 5 is not supported"),
    "nan": (lambda: QLinear.from_linear(_filled(float("nan")), name="model.up"), "model.up: quantize"),
    "inf": (lambda: QLinear.from_linear(_filled(float("inf")), name="model.up"), "model.up: quantize"),
    "float64": (lambda: QLinear.from_linear(nn.Linear(96, 8).double()), "float64"),
    "groups": (lambda: QLinear.from_tensors(CODES, torch.ones(8, 5), num_bits=4), r"\[8, 96\] and scale \[8, 5\]"),
    "no groups": (lambda: QLinear.from_tensors(CODES, torch.ones(8, 0), num_bits=4), r"scale \[8, 0\]"),
    "bias": (lambda: QLinear.from_tensors(CODES, SCALE, num_bits=4, bias=torch.ones(9)), r"bias has shape \[9\]"),
    "codes": (lambda: QLinear.from_tensors(CODES.int(), SCALE, num_bits=4), "codes is int32; expected int8"),
    "scale dtype": (lambda: QLinear(96, 8, scale_dtype=torch.float64), "float64"),
    "features": (lambda: QLinear.from_linear(LINEAR)(torch.randn(2, 64)), "x has 64 features; the weight takes 96"),
}


def _filled(value: float) -> nn.Linear:
    linear = nn.Linear(96, 8)
    nn.init.constant_(linear.weight, value)
    return linear


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_a_sentence(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        call()


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = ({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)} for _ in range(2))
        self.blocks = nn.ModuleList(map(nn.ModuleDict, blocks))
        self.attention = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 8)
        self.again = self.head


def test_replace_swaps_by_name_and_keeps_shared_modules_shared() -> None:
    model = Tree()
    names = linear_names(model)
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head", "again"]
    made: list[str] = []

    def make(name: str, linear: nn.Linear) -> nn.Module:
        made.append(name)
        return QLinear.from_linear(linear, name=name)

    replace(model, [name for name in names if not name.endswith("0.up")], make)
    assert made == ["blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert model.again is model.head
    assert isinstance(model.head, QLinear)
    assert linear_names(model) == ["blocks.0.up"]


def test_replace_refuses_names_that_are_no_linear() -> None:
    model = Tree()
    for name, sentence in (("blocks.7.up", "has no module 'blocks.7.up'"), ("blocks.0", "is a ModuleDict")):
        with pytest.raises(InputError, match=sentence):
            replace(model, [name], lambda _, linear: linear)
    with pytest.raises(InputError, match="has no module 'tail'"):
        set_module(model, "tail", nn.Identity())
    with pytest.raises(InputError, match="is itself what should be replaced"):
        replace(nn.Linear(4, 4), [""], lambda _, linear: linear)
