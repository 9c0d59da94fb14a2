"""The fused inverted residual cell against the composition of plain modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import assert_close, relative_error

import nvae_fast as nf
from nvae_fast.nn import BatchNormSwish, InvertedResidualCell
from nvae_fast.ops.inverted_residual import train as fused

STRIDES = [(1, 6), (2, 8), (-1, 4)]
pytestmark = pytest.mark.skipif(
    not fused.available(torch.device("cpu")), reason="no fused kernels on this machine"
)


@pytest.fixture(params=["gram", "pass"])
def variance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where BN1's variance comes from; sizes decide, and a test wants both."""
    monkeypatch.setattr(fused, "_gram_pays", lambda *sizes: request.param == "gram")
    return request.param


def make(
    stride: int, c_out: int, *, kernel: int = 5, se: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """A cell with gammas of both signs and betas away from zero."""
    cell = InvertedResidualCell(6, c_out, 3, kernel, stride, squeeze_excite=se).to(dtype).train()
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, BatchNormSwish):
                module.weight.normal_()
                module.bias.normal_()
    return cell


def run(cell: Any, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    cell = copy.deepcopy(cell)
    x = x.detach().requires_grad_()
    y = cell(x)
    y.backward(upstream.to(y.dtype))
    found = {"y": y.detach(), "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in cell.named_parameters()}
    return found | {name: b.clone() for name, b in cell.named_buffers()}


def inputs(
    stride: int, c_out: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    h, w = 6, 8
    out = (2 * h, 2 * w) if stride == -1 else (h // stride, w // stride)
    x = (
        torch.randn(4, 6, h, w) * torch.linspace(0.5, 2, 6)[:, None, None]
        + torch.linspace(-3, 3, 6)[:, None, None]
    )
    x, upstream = (t.to(dtype).contiguous(memory_format=layout) for t in (x, torch.randn(4, c_out, *out)))
    return x, upstream


def compare(actual: dict, truth: dict, tolerance: float) -> None:
    """Each result relative to itself; gradients, some of which are analytically zero, to a hundredth of all at least."""
    total = torch.cat([t.double().flatten() for k, t in truth.items() if k.startswith("grad ")]).norm()
    for key, expected in truth.items():
        error = (actual[key].double() - expected.double()).norm()
        floor = 0.01 * total if key.startswith("grad ") else 0.0
        scale = max(float(expected.double().norm()), float(floor))
        assert error <= tolerance * scale + 1e-300, f"{key}: {float(error / scale):.3g} exceeds {tolerance}"


@pytest.mark.usefixtures("variance")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("se", [True, False])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride, c_out", STRIDES)
def test_equals_the_composition(
    stride: int, c_out: int, kernel: int, se: bool, layout: torch.memory_format
) -> None:
    """Value, every gradient and the running statistics, in float64 and float32."""
    cell = make(stride, c_out, kernel=kernel, se=se, dtype=torch.float64)
    x, upstream = inputs(stride, c_out, torch.float64, layout)
    with nf.use_backend("reference"):
        truth = run(cell, x, upstream)
    found = run(cell, x, upstream)
    compare(found, truth, 1e-11)
    assert found["y"].is_contiguous(memory_format=layout) or stride != 1
    compare(run(cell.float(), x.float(), upstream), truth, 2e-5)


@pytest.mark.usefixtures("variance")
@pytest.mark.parametrize("stride, c_out", STRIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_pytorch(stride: int, c_out: int, dtype: torch.dtype) -> None:
    """Under autocast: at most twice the error of the composition against float64."""
    cell = make(stride, c_out)
    x, upstream = inputs(stride, c_out, torch.float32, torch.channels_last)

    def with_autocast() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype):
            return run(cell, x, upstream)

    with nf.use_backend("reference"):
        truth = run(copy.deepcopy(cell).double(), x.double(), upstream)
        native = with_autocast()
    found = with_autocast()
    for key in truth:
        if key.startswith("grad ") and "norm.bias" not in key:  # the first beta's gradient is zero
            lost = max(relative_error(native[key], truth[key]), torch.finfo(dtype).eps)
            assert relative_error(found[key], truth[key]) <= 2 * lost, key
    assert_close(found["y"], truth["y"], 2 * relative_error(native["y"], truth["y"]) + torch.finfo(dtype).eps)


@pytest.mark.usefixtures("variance")
@pytest.mark.parametrize("stride, c_out", STRIDES)
def test_gradcheck(stride: int, c_out: int) -> None:
    cell = make(stride, c_out, kernel=3, dtype=torch.float64)
    x, _ = inputs(stride, c_out, torch.float64, torch.channels_last)
    names = [name for name, _ in cell.named_parameters()]

    def function(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(cell, dict(zip(names, leaves, strict=True)), (x,))

    leaves = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert torch.autograd.gradcheck(
        function, (x[:2, :, :4, :4].clone().requires_grad_(), *leaves), fast_mode=True
    )


@pytest.mark.usefixtures("variance")
@pytest.mark.parametrize("stride, c_out", STRIDES)
def test_statistics_of_a_far_mean(stride: int, c_out: int) -> None:
    """|mean| / std = 100: running statistics to 1e-5 of what float64 finds."""
    cell = make(stride, c_out)
    x, upstream = inputs(stride, c_out, torch.float32, torch.channels_last)
    x = x - x.mean((0, 2, 3), keepdim=True)
    x = x / x.std((0, 2, 3), keepdim=True) + 100
    with nf.use_backend("reference"):
        truth = run(copy.deepcopy(cell).double(), x.double(), upstream)
    found = run(cell, x, upstream)
    for key, expected in truth.items():
        if "running_var" in key:
            batch = (expected - 0.95) / 0.05
            assert_close((found[key].double() - 0.95) / 0.05, batch, 1e-5, key)
        elif "running_mean" in key:
            assert_close(found[key], expected, 1e-5, key)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("se", [True, False])
@pytest.mark.parametrize("stride, c_out", STRIDES)
def test_evaluation_folds(stride: int, c_out: int, se: bool, layout: torch.memory_format) -> None:
    cell = make(stride, c_out, se=se, dtype=torch.float64)
    x, upstream = inputs(stride, c_out, torch.float64, layout)
    cell(x)  # running statistics of its own
    cell.eval()
    with nf.use_backend("reference"):
        truth = run(cell, x, upstream)
    compare(run(cell, x, upstream), truth, 1e-11)
    compare(run(cell.float(), x.float(), upstream), truth, 2e-5)


@pytest.mark.parametrize("se", [True, False])
@pytest.mark.parametrize("stride, c_out", STRIDES)
def test_folded_weights_follow_every_change(stride: int, c_out: int, se: bool) -> None:
    """Without gradients the folds are kept, and made again when any parameter or statistic changes, however."""
    cell = make(stride, c_out, se=se, dtype=torch.float64)
    x, _ = inputs(stride, c_out, torch.float64, torch.channels_last)
    cell(x)
    cell.eval()

    def check() -> None:
        with torch.no_grad():
            found = cell(x)
            assert torch.equal(cell(x), found)
            with nf.use_backend("reference"):
                assert_close(found, cell(x), 1e-11)

    check()
    for tensor in (*cell.ops.parameters(), *cell.ops.buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.mul_(1.25)
            check()
    with torch.no_grad():
        cell.ops[0].project.weight.data = cell.ops[0].project.weight.data * 0.5
    check()
    cell.load_state_dict(make(stride, c_out, se=se, dtype=torch.float64).state_dict())
    check()
    other = copy.deepcopy(cell)
    with torch.no_grad():
        other.ops[0].norm.weight.add_(1)
    check()
    with torch.inference_mode():
        assert torch.equal(cell(x), cell(x))
    cell.float()
    with torch.no_grad():
        assert cell(x.float()).dtype == torch.float32


@pytest.mark.usefixtures("variance")
def test_memory_held_for_backward() -> None:
    """At most half of what eager holds, in channels_last, at expansion 6."""
    cell = InvertedResidualCell(16, 16, 6, 5, squeeze_excite=True).train()
    x = torch.randn(4, 16, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    parameters = {p.data_ptr() for p in cell.parameters()}

    def held() -> int:
        found: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in parameters:
                found[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep = cell(x)
        del keep
        return sum(found.values())

    ours = held()
    with nf.use_backend("reference"):
        eager = held()
    unit = x.numel() * 4
    assert ours <= 14.5 * unit
    assert ours <= eager / 2


def test_saved_tensors_may_be_asked_for_alone() -> None:
    """Only some of the gradients: the others do not come, those that do are the same."""
    cell = make(1, 6)
    x, upstream = inputs(1, 6, torch.float32, torch.channels_last)
    every = run(cell, x, upstream)
    cell.requires_grad_(False)
    x = x.requires_grad_()
    cell(x).backward(upstream)
    assert torch.equal(x.grad, every["grad x"])
    cell.requires_grad_(True)
    cell(x.detach()).backward(upstream)
    assert torch.equal(cell.ops[0].depthwise.weight.grad, every["grad ops.0.depthwise.weight"])


@pytest.mark.usefixtures("variance")
def test_repeatable() -> None:
    cell = make(-1, 4)
    x, upstream = inputs(-1, 4, torch.float32, torch.channels_last)
    first, second = run(cell, x, upstream), run(cell, x, upstream)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_double_backward_raises() -> None:
    cell = make(1, 6)
    x, _ = inputs(1, 6, torch.float32, torch.channels_last)
    y = cell(x.requires_grad_())
    with pytest.raises(
        RuntimeError, match=r"inverted_residual_cell: double backward is not supported; use .*reference"
    ):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_mixed_modes_take_the_composition() -> None:
    """One batch norm in evaluation mode: what its module says counts."""
    cell = make(1, 6, dtype=torch.float64)
    cell.ops[0].depthwise_norm.eval()
    x, upstream = inputs(1, 6, torch.float64, torch.channels_last)
    with nf.use_backend("reference"):
        truth = run(cell, x, upstream)
    compare(run(cell, x, upstream), truth, 1e-12)


@pytest.mark.parametrize("part", ["depthwise", "expand_norm", "project"])
def test_hooks_inside_are_called(part: str) -> None:
    """Somebody looks at what is inside: then it is computed as modules, with the same result."""
    cell = make(1, 6, dtype=torch.float64)
    x, upstream = inputs(1, 6, torch.float64, torch.channels_last)
    expected = run(cell, x, upstream)
    seen = []
    getattr(cell.ops[0], part).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    compare(run(cell, x, upstream), expected, 1e-11)
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["eps", "activation", "subclass"])
def test_changed_parts_are_respected(change: str) -> None:
    """A cell that is no longer what the fused function computes is computed as it stands."""
    cell = make(1, 6, dtype=torch.float64)
    norm = cell.ops[0].depthwise_norm
    if change == "eps":
        norm.eps = 0.5
    elif change == "activation":
        norm.activation = "elu"
    else:
        kind = type(cell.ops[0].depthwise)
        doubled = type("Doubled", (kind,), {"forward": lambda self, h: 2 * kind.forward(self, h)})
        cell.ops[0].depthwise.__class__ = doubled
    x, upstream = inputs(1, 6, torch.float64, torch.channels_last)
    with nf.use_backend("reference"):
        truth = run(cell, x, upstream)
    compare(run(cell, x, upstream), truth, 1e-12)


@pytest.mark.parametrize("stride, c_out", STRIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_half_precision(stride: int, c_out: int, dtype: torch.dtype) -> None:
    """Parameters and input in half precision: output and gradients in it, near the truth."""
    cell = make(stride, c_out)
    x, upstream = inputs(stride, c_out, torch.float32, torch.channels_last)
    with nf.use_backend("reference"):
        truth = run(copy.deepcopy(cell).double(), x.double(), upstream)
    found = run(cell.to(dtype), x.to(dtype), upstream)
    assert found["y"].dtype == found["grad x"].dtype == found["grad ops.0.expand.weight"].dtype == dtype
    assert_close(found["y"], truth["y"], 16 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("variance")
def test_empty_batch() -> None:
    cell = make(1, 6)
    before = {name: b.clone() for name, b in cell.named_buffers()}
    x = torch.zeros(0, 6, 4, 4, requires_grad=True)
    y = cell(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(not p.grad.any() for p in cell.parameters())
    assert all(torch.equal(b, before[name]) for name, b in cell.named_buffers())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"stride": 3}, r"stride must be one of \[1, 2, -1\], got 3"),
        (
            lambda a: a | {"skip": a["skip"][:, :4]},
            r"skip must have shape \(2, 6, 4, 4\), got \(2, 4, 4, 4\)",
        ),
        (
            lambda a: a | {"x": a["x"][:, :4]},
            "x must have 6 channels, which is what expand takes, got 4",
        ),
        (lambda a: a | {"x": a["x"].int()}, "x must have one of the dtypes"),
        (
            lambda a: a | {"x": a["x"][:1, :, :1, :1], "skip": a["skip"][:1, :, :1, :1]},
            "more than one value per channel",
        ),
    ],
)
def test_errors(change: Any, message: str) -> None:
    cell = make(1, 6)
    op = cell.ops[0]
    parameters = fused.CellParameters(
        op.norm.weight, op.norm.bias, op.expand.weight, op.expand_norm.weight, op.expand_norm.bias, op.depthwise.weight,
        op.depthwise_norm.weight, op.depthwise_norm.bias, op.project.weight, op.project_norm.weight, op.project_norm.bias,
    )  # fmt: skip
    x = torch.randn(2, 6, 4, 4)
    arguments = change({"x": x, "skip": x, "stride": 1})
    with pytest.raises((ValueError, TypeError), match=message):
        fused.inverted_residual_cell(
            arguments["x"], arguments["skip"], parameters, stride=arguments["stride"]
        )


def test_small_maps_of_many_channels_take_the_pass() -> None:
    """The cells of the six presets on both sides of the choice: pixels of a batch, E C, C."""
    pays = fused._gram_pays
    assert pays(8192, 768, 128)
    assert pays(8192, 384, 64)
    assert not pays(1024, 768, 128)
    assert not pays(256, 1536, 256)
