"""Loaded models under what records or transforms a program: make_fx, torch.func, torch.export, dynamic shapes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from qtensor import (
    QTensor,
    QTensorError,
    Scheme,
    fp8_per_block,
    fp8_per_channel,
    int8_per_channel,
    online_quant,
    weight_checksums,
)

SCHEMES = {"block": fp8_per_block, "int8": int8_per_channel}
X, OTHER = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (4, 7))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def loaded(scheme: Scheme) -> Net:
    torch.manual_seed(0)
    state = Net().state_dict()
    with online_quant(scheme):
        model = Net()
        model.load_state_dict(state)
    assert type(model.up.weight) is QTensor
    return model


@pytest.fixture(params=list(SCHEMES))
def model(request: pytest.FixtureRequest) -> Net:
    return loaded(SCHEMES[request.param])


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-5) -> bool:
    return bool((a - b).norm() <= limit * b.norm())


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(model: Net, mode: str) -> None:
    record = make_fx(
        lambda x: model(x) + (x @ model.up.weight.dequantize().T)[:, :64],
        tracing_mode=mode,
        _allow_non_fake_inputs=True,
    )
    graph, x = record(X), OTHER if mode == "symbolic" else OTHER[:4]
    assert close(graph(x), model(x) + (x @ model.up.weight.dequantize().T)[:, :64])


def test_make_fx_while_a_session_is_open() -> None:
    """The values of weights that are being loaded are constants of the program."""
    state = Net().state_dict()
    with online_quant(fp8_per_channel):
        model = Net()
        model.load_state_dict(state)
        graph = make_fx(lambda x: model(x), _allow_non_fake_inputs=True)(X)
        assert close(graph(X), model(X))
    assert close(graph(X), model(X))


def plain_of(model: Net) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same model on dequantized weights."""
    plain = Net()
    with torch.no_grad():
        for name, param in plain.named_parameters():
            quantized = model.get_parameter(name)
            param.copy_(quantized.dequantize() if isinstance(quantized, QTensor) else quantized)
    return plain


def test_torch_func(model: Net) -> None:
    """Where activations are quantized on the way, so are tangents: forward mode differs by that rounding."""
    plain, loss = plain_of(model), lambda x: model(x).sum()
    rounding = 0.1 if model.up.weight.scheme.activation == "dynamic" else 1e-5  # type: ignore[union-attr]
    x = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    assert close(torch.func.grad(loss)(X), wanted)
    tangent = torch.func.jvp(plain, (X,), (OTHER[:4],))[1]
    assert close(torch.func.jvp(model, (X,), (OTHER[:4],))[1], tangent, rounding)
    out, linear = torch.func.linearize(model, X)
    assert close(out, model(X))
    assert close(linear(OTHER[:4]), tangent, rounding)
    assert close(torch.func.vmap(model)(torch.stack([X, OTHER[:4]]))[1], model(OTHER[:4]))


def test_dequantize_inside_a_transform(model: Net) -> None:
    weight = model.up.weight.dequantize()
    got = torch.func.grad(lambda x: (x @ model.up.weight.dequantize().T).square().sum())(X)
    assert close(got, 2 * (X @ weight.T) @ weight)
    got = torch.func.vmap(lambda x: model.up.weight.dequantize() @ x)(X)
    assert close(got, X @ weight.T)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    model = loaded(fp8_per_channel)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (X,), strict=strict, dynamic_shapes=shapes)
    assert close(program.module()(OTHER), model(OTHER))


@pytest.mark.skipif(not os.environ.get("QTENSOR_ENDURANCE"), reason="half a minute of g++: make endurance")
def test_aot_inductor(tmp_path: Path) -> None:
    model = loaded(fp8_per_channel)
    program = torch.export.export(model, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for x in (X, OTHER):
        assert close(compiled(x), model(x))


def test_make_fx_before_dispatch_is_refused_by_pytorch(model: Net) -> None:
    """It asks no tensor subclass. docs/errors.md has this message, and what to do."""
    with pytest.raises(RuntimeError, match="Unable to cast NotImplemented to Tensor"):
        make_fx(lambda x: model(x), pre_dispatch=True, _allow_non_fake_inputs=True)(X)


def test_compile_with_dynamic_shapes() -> None:
    model = loaded(fp8_per_channel)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for x in (X, OTHER, OTHER[:1]):
        assert close(compiled(x), model(x))


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "all": lambda w, x: w.mul_(2),
    "copy": lambda w, x: w.copy_(x.expand_as(w)),
    "item": lambda w, x: w.__setitem__((slice(None), slice(3, 7)), x[:4]),
    "a row": lambda w, x: w[3].add_(x),
    "a row of data": lambda w, x: w.data[3].copy_(x),
    "rows of a view": lambda w, x: w.view(-1)[64:192].view(2, 64)[1].fill_(1),
    "columns of it turned": lambda w, x: w.t()[:, 3].zero_(),
    "columns": lambda w, x: w[:, 3:7].add_(1),
    "every other row": lambda w, x: w[::2].mul_(2),
    "out=": lambda w, x: torch.mul(x, x, out=w[3]),
    "several": lambda w, x: torch._foreach_add_([x.clone(), w.unbind(0)[3]], 1.0),
}


def exported(program: nn.Module, *args: torch.Tensor) -> None:
    torch.export.export(program, args)


def compiled(program: nn.Module, *args: torch.Tensor) -> None:
    torch.compiler.reset()
    torch.compile(program, backend="aot_eager", fullgraph=True)(*args)


def recorded(program: nn.Module, *args: torch.Tensor) -> None:
    make_fx(program, _allow_non_fake_inputs=True)(*args)


@pytest.mark.parametrize("trace", [compiled, exported, recorded])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_program_writes_to_a_weight(name: str, trace: Callable[..., None]) -> None:
    """Whichever way the part is taken. It could not quantize, and the write would be lost. torch.export asks no tensor
    subclass about some of them, and fails, as make_fx before dispatch does."""
    refused = "would be lost. Write outside of the function"
    if trace is exported:
        refused += "|Unable to cast NotImplemented to Tensor"
    up = loaded(SCHEMES[name]).up
    before = weight_checksums(up)

    class Writes(nn.Module):
        def __init__(self, write: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
            super().__init__()
            self.up, self.write = up, write

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.write(self.up.weight, x)
            return x * 2

    for write in WRITES.values():
        with pytest.raises(Exception, match=refused):
            trace(Writes(write), X[0])
    assert weight_checksums(up) == before


def test_a_part_that_a_compiled_function_read() -> None:
    """It has the plain tensor's values, gradients pass by it, and nobody writes to it."""
    weight = loaded(fp8_per_channel).up.weight
    plain = weight.dequantize()

    def program(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = weight.view(8, 16, 64)[:, 2:7]
        return torch.einsum("hd,hed->he", x.view(8, 8).repeat(1, 8), heads), weight[3]

    torch.compiler.reset()
    x, y = (X[0].clone().requires_grad_() for _ in range(2))
    out, row = torch.compile(program, backend="aot_eager", fullgraph=True)(weight, x)
    wanted, _ = program(plain, y)
    for result in (out, wanted):
        result.square().sum().backward()
    assert close(out, wanted)
    assert x.grad is not None
    assert y.grad is not None
    assert close(x.grad, y.grad)
    assert torch.equal(row + 0, plain[3])
    assert torch.equal(torch.from_numpy(row.numpy()), plain[3])
    assert row.tolist() == plain[3].tolist()
    assert torch.equal(copy.deepcopy(row), plain[3])
    assert repr(row) == repr(plain[3])
    with pytest.raises(QTensorError, match=r"part of one, \[32\], in a function that is recorded"):
        row[:32].add_(1)


def test_a_write_inside_vmap_arrives() -> None:
    weight = loaded(fp8_per_channel).up.weight
    doubled = weight[3].clone() * 2
    torch.func.vmap(lambda x: weight[3].mul_(2) + x)(X)
    assert torch.equal(weight[3], doubled)
