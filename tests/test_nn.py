"""The modules: cells against the recorded numbers, skips, flows, data-dependent initialisation, norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import Record, assert_close, assert_same_gradients, relative_error
from torch import nn

import nvae_fast as nf
from nvae_fast.nn import (
    BatchNormSwish,
    ConvBlock,
    DecoderCombiner,
    InvertedResidual,
    InvertedResidualCell,
    ResidualCell,
    SkipDown,
    SkipUp,
    SqueezeExcite,
    WeightNormConv2d,
)

# Cells

CELLS = {
    "mconv_e6k5g0_s1": (8, 8, 1, 6, 5),
    "mconv_e3k5g0_s2": (8, 16, 2, 3, 5),
    "mconv_e6k5g0_s-1": (8, 4, -1, 6, 5),
    "mconv_e6k11g0_s1": (6, 6, 1, 6, 11),
}


def official_names(stride: int) -> dict[str, str]:
    """Specification section 8: positions shift by one behind the upsampling."""
    first = 1 if stride == -1 else 0
    return {
        "norm": f"conv.{first}.bn",
        "expand": f"conv.{first + 1}.conv.0",
        "expand_norm": f"conv.{first + 1}.conv.1",
        "depthwise": f"conv.{first + 2}.conv.0",
        "depthwise_norm": f"conv.{first + 2}.conv.1",
        "project": f"conv.{first + 3}",
        "project_norm": f"conv.{first + 4}.bn",
    }


@pytest.mark.parametrize("name", CELLS)
def test_recorded_cell(
    name: str, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    record = Record("ops", f"cell/{name}/")
    c_in, c_out, stride, expansion, kernel_size = CELLS[name]
    cell = InvertedResidual(c_in, c_out, stride, expansion=expansion, kernel_size=kernel_size)
    theirs = {
        key: f"{official_names(stride)[key.partition('.')[0]]}.{key.partition('.')[2]}"
        for key in cell.state_dict()
    }
    cell.load_state_dict({key: record[f"state/{official}"] for key, official in theirs.items()})
    cell.to(device, memory_format=memory_format).train()

    x = record["x"].to(device, memory_format=memory_format).requires_grad_()
    y = cell(x)
    y.backward(record["grad_y"].to(device))
    assert_close(y, record["y"], 1e-5, "y")
    gradients = {theirs[key]: parameter.grad.cpu() for key, parameter in cell.named_parameters()}
    assert_same_gradients({"x": x.grad.cpu(), **gradients}, {"x": record["grad_x"], **record.under("grad/")})
    ours = {official: key for key, official in theirs.items()}
    for official, value in record.under("state_after/").items():
        assert_close(cell.state_dict()[ours[official]], value, 5e-6, official)
    assert_close(cell.eval()(x), record["eval_y"], 1e-5, "eval_y")


NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize(
    "stride, skip", [(1, []), (2, [f"skip.convs.{i}." for i in range(4)]), (-1, ["skip.conv."])]
)
def test_state_dict_keys(stride: int, skip: list[str]) -> None:
    """Names in a user's checkpoint: they do not change."""
    cell = InvertedResidualCell(8, {1: 8, 2: 16, -1: 4}[stride], 3, 5, stride, squeeze_excite=True)
    expected = [f"ops.0.{conv}.weight" for conv in ("expand", "depthwise", "project")]
    expected += [
        f"ops.0.{norm}.{key}"
        for norm in ("norm", "expand_norm", "depthwise_norm", "project_norm")
        for key in NORM
    ]
    expected += [f"se.{linear}.{key}" for linear in ("reduce", "expand") for key in ("weight", "bias")]
    leaves = ["weight", "log_weight_norm"] + ([] if stride == -1 else ["bias"])
    expected += [prefix + key for prefix in skip for key in leaves]
    assert sorted(cell.state_dict()) == sorted(expected)
    again = InvertedResidualCell(8, {1: 8, 2: 16, -1: 4}[stride], 3, 5, stride, squeeze_excite=True)
    again.load_state_dict(cell.state_dict())
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(again.eval()(x), cell.eval()(x))


@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("stride, c_out", [(1, 8), (2, 16), (-1, 4)])
@pytest.mark.parametrize("groups", [0, 8])
def test_cell_is_skip_plus_a_tenth(
    stride: int, c_out: int, groups: int, squeeze_excite: bool, route: str
) -> None:
    cell = InvertedResidualCell(8, c_out, 3, 5, stride, groups, squeeze_excite).double().eval()
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    (op,) = cell.ops
    h = op.norm(F.interpolate(x, scale_factor=2) if stride == -1 else x)
    h = F.conv2d(h, op.expand.weight)
    h = F.silu(h / (1 + 1e-5) ** 0.5)
    h = F.conv2d(h, op.depthwise.weight, stride=abs(stride), padding=2, groups=groups or 24)
    h = F.silu(h / (1 + 1e-5) ** 0.5)
    s = F.conv2d(h, op.project.weight) / (1 + 1e-5) ** 0.5
    if squeeze_excite:
        gate = torch.sigmoid(cell.se.expand(F.relu(cell.se.reduce(s.mean((2, 3))))))
        s = s * gate[:, :, None, None]
    assert_close(cell(x), cell.skip(x) + 0.1 * s, 1e-12)


@pytest.mark.parametrize("channels, hidden", [(4, 4), (64, 4), (80, 5), (512, 32)])
def test_squeeze_excite_width(channels: int, hidden: int) -> None:
    assert SqueezeExcite(channels).reduce.weight.shape == (hidden, channels)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, -1])
@pytest.mark.parametrize("norm, activation", [(True, "swish"), (True, "elu"), (False, "elu")])
def test_conv_block(norm: bool, activation: str, stride: int, dilation: int, route: str) -> None:
    block = ConvBlock(6, 5, stride, batch_norm=norm, activation=activation, dilation=dilation).double().eval()
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64)
    h = x / (1 + 1e-5) ** 0.5 if norm else x
    h = F.silu(h) if activation == "swish" else F.elu(h)
    h = F.interpolate(h, scale_factor=2) if stride == -1 else h
    weight = block.conv.weight
    norms = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    weight = block.conv.log_weight_norm.exp() * weight / (norms + 1e-5)
    expected = F.conv2d(h, weight, block.conv.bias, stride=abs(stride), padding=dilation, dilation=dilation)
    assert_close(block(x), expected, 1e-12)
    assert_close(
        block.conv.log_weight_norm, torch.log(norms + 0.01), 1e-6, "at construction: log(norm + 0.01)"
    )


@pytest.mark.parametrize("c_out", [16, 18])
def test_skip_down(c_out: int, route: str) -> None:
    """swish, then four stride-2 1x1 convolutions of the input shifted by (0,0), (1,1), (0,1), (1,0)."""
    skip = SkipDown(8, c_out).double()
    x = torch.randn(2, 8, 6, 10, dtype=torch.float64)
    parts = []
    for conv, (rows, columns) in zip(skip.convs, ((0, 0), (1, 1), (0, 1), (1, 0)), strict=True):
        shifted = F.silu(x)[:, :, rows:, columns:]
        parts.append(F.conv2d(shifted, conv.normalized_weight(), conv.bias, stride=2))
    assert_close(skip(x), torch.cat(parts, dim=1), 1e-12)
    assert skip(x).shape == (2, c_out, 3, 5)
    with pytest.raises(
        ValueError, match=r"SkipDown: x must have an even height and width, got \(2, 8, 5, 10\)"
    ):
        skip(x[:, :, 1:])


def test_skip_up(route: str) -> None:
    """Bilinear x2 with aligned corners, in one dimension written out: output i reads position i (n - 1) / (2
    n - 1)."""
    skip = SkipUp(6, 3).double()

    def matrix(n: int) -> torch.Tensor:
        position = torch.arange(2 * n, dtype=torch.float64) * (n - 1) / (2 * n - 1)
        return torch.clamp(1 - (position[:, None] - torch.arange(n)).abs(), min=0)

    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    upsampled = matrix(4) @ x @ matrix(5).T
    assert skip.conv.bias is None
    assert_close(
        skip(x), torch.einsum("oi,bihw->bohw", skip.conv.normalized_weight()[..., 0, 0], upsampled), 1e-12
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ResidualCell(8, 8, 3, [], squeeze_excite=False), "stride must be 1, 2 or -1 .*got 3"),
        (lambda: InvertedResidualCell(8, 16, 3, 5), "stride 1 keeps the width, got 8 -> 16 channels"),
        (
            lambda: InvertedResidualCell(8, 8, 3, 5, groups=7),
            r"groups=7 must divide in_channels \* expansion = 24",
        ),
        (lambda: InvertedResidualCell(8, 8, 3, 4), "kernel_size must be an odd int >= 1, got 4"),
        (lambda: InvertedResidualCell(8, 8, 3, "5"), "kernel_size must be an odd int >= 1, got '5'"),
        (lambda: InvertedResidualCell(8, 8, 0, 5), "expansion must be an int >= 1, got 0"),
        (
            lambda: nf.nn.WeightNormConv2d(8, 8, 2),
            "WeightNormConv2d: kernel_size must be an odd int >= 1, got 2",
        ),
        (lambda: nf.nn.PlainConv2d(8, 8, 0), "PlainConv2d: kernel_size must be an odd int >= 1, got 0"),
        (lambda: nf.nn.BatchNormSwish(8, "gelu"), "BatchNormSwish: activation must be one of .*got 'gelu'"),
        (lambda: ConvBlock(8, 8, 0), "stride must be 1, 2 or -1 .*got 0"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Index:
    """What operator.index accepts."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("convert", [np.int64, np.uint8, Index])
def test_sizes_may_be_integers_of_any_type(convert: Any) -> None:
    x, modules = torch.randn(2, 8, 4, 4), []
    for kind in (int, convert):
        torch.manual_seed(0)
        modules.append(
            (
                InvertedResidualCell(8, 8, kind(2), kind(5)),
                nf.nn.InvertedResidual(8, 8, expansion=kind(2), kernel_size=kind(3)),
                WeightNormConv2d(8, 8, kind(3)),
                nf.nn.PlainConv2d(8, 8, kind(3)),
            )
        )
    for plain, other in zip(*modules, strict=True):
        assert repr(other) == repr(plain)
        assert torch.equal(other(x), plain(x))
    for wrong in (2.0, True, convert(2)):
        with pytest.raises(ValueError, match="WeightNormConv2d: kernel_size must be an odd int >= 1"):
            WeightNormConv2d(8, 8, wrong)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: WeightNormConv2d(6, 8, 3, data_init=True)(torch.zeros(2, 5, 4, 4)),
            r"WeightNormConv2d: x must have 6 channels, got \(2, 5, 4, 4\)",
        ),
        (
            lambda: WeightNormConv2d(6, 6, 3, groups=6)(torch.zeros(6, 4, 4)),
            r"x must have shape \(B, C, H, W\), got \(6, 4, 4\)",
        ),
        (
            lambda: DecoderCombiner(6, 2, 8)(torch.zeros(2, 6, 4, 4), torch.zeros(2, 2, 2, 2)),
            r"DecoderCombiner: z must have shape \(2, 2, 4, 4\), got \(2, 2, 2, 2\)",
        ),
        (
            lambda: DecoderCombiner(6, 2, 8)(torch.zeros(2, 5, 4, 4), torch.zeros(2, 2, 4, 4)),
            r"DecoderCombiner: s must have 6 channels, got \(2, 5, 4, 4\)",
        ),
    ],
)
def test_errors_of_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Data-dependent initialisation


def test_data_dependent_initialisation(route: str) -> None:
    """Mean 0 and standard deviation 0.2 for the first training batch, once."""
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").train()
    x = 3 * torch.randn(8, 6, 10, 10) + 1
    y = block(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    assert (y.std((0, 2, 3)) - 0.2).abs().max() < 1e-4
    before = {key: value.clone() for key, value in block.state_dict().items()}
    assert relative_error(block(2 * x), y) > 0.1
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), "only the first batch initialises"


def test_initialisation_waits_for_training(route: str) -> None:
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").eval()
    before = block.conv.bias.clone()
    block(torch.randn(8, 6, 10, 10))
    assert torch.equal(block.conv.bias, before)
    block.train()(torch.randn(8, 6, 10, 10))
    assert not torch.equal(block.conv.bias, before)


def test_loading_a_state_marks_initialisation_as_done(route: str) -> None:
    source = ConvBlock(6, 5, batch_norm=False, activation="elu")
    block = ConvBlock(6, 5, batch_norm=False, activation="elu")
    block.load_state_dict(source.state_dict())
    block.train()(torch.randn(8, 6, 10, 10))
    for key, value in block.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_only_the_elu_cells_convolutions_are_data_initialised() -> None:
    assert not ConvBlock(6, 5).conv.needs_data_init
    assert not ConvBlock(6, 5, activation="elu").conv.needs_data_init
    assert not WeightNormConv2d(6, 5, 1).needs_data_init


@pytest.mark.parametrize("size", [(0, 6, 10, 10), (1, 6, 1, 1)])
def test_initialisation_needs_a_spread(size: tuple, route: str) -> None:
    """A batch that has none is no reason to write NaN into the parameters: the next one initialises."""
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").train()
    block(torch.randn(size))
    assert all(torch.isfinite(p).all() for p in block.parameters())
    y = block(torch.randn(8, 6, 10, 10))
    assert (y.std((0, 2, 3)) - 0.2).abs().max() < 1e-4


# Batch norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_against_pytorch(
    dtype: torch.dtype, route: str, memory_format: torch.memory_format
) -> None:
    ours, theirs = BatchNormSwish(5, None).to(dtype), nn.BatchNorm2d(5, momentum=0.05).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([1.0, -0.5, 2.0, -3.0, 0.1]))
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for _ in range(3):
        x = (2 * torch.randn(4, 5, 3, 7, dtype=dtype) + 1).contiguous(memory_format=memory_format)
        upstream = torch.randn(4, 5, 3, 7, dtype=dtype)
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(upstream)
            results.append((y, leaf.grad, module.weight.grad, module.bias.grad))
        for a, e in zip(*results, strict=True):
            assert_close(a, e, tolerance)
        for key in ("running_mean", "running_var"):
            assert_close(getattr(ours, key), getattr(theirs, key), tolerance, key)
        assert ours.num_batches_tracked == theirs.num_batches_tracked
    assert_close(ours.eval()(x), theirs.eval()(x), tolerance)
    assert ours.num_batches_tracked == 3


def test_batch_norm_with_an_empty_batch(route: str) -> None:
    module = BatchNormSwish(5).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert module(torch.zeros(0, 5, 4, 4)).shape == (0, 5, 4, 4)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_set_process_group_reaches_every_module() -> None:
    group = object()
    cell = ResidualCell(
        4, 4, 1, [ConvBlock(4, 4), ConvBlock(4, 4, batch_norm=False, activation="elu")], squeeze_excite=False
    )
    assert nf.nn.set_process_group(cell, group) is cell
    merging = [m for m in cell.modules() if isinstance(m, (BatchNormSwish, WeightNormConv2d))]
    assert len(merging) == 3
    assert all(module.process_group is group for module in merging)


# Autocast and compilation


@pytest.mark.parametrize("stride, c_out", [(1, 8), (2, 16), (-1, 4)])
def test_autocast(stride: int, c_out: int, route: str) -> None:
    """Half precision inside, close to fp32 outside, gradients finite and in the parameters' dtype."""
    cell = InvertedResidualCell(8, c_out, 3, 5, stride, squeeze_excite=True).train()
    x = torch.randn(4, 8, 8, 8)
    expected = cell(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = cell(x)
        y.float().square().mean().backward()
    assert relative_error(y, expected) < 0.03
    for parameter in cell.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


def test_compiles(device: torch.device) -> None:
    """The whole cell in training mode, running statistics included, in one graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = InvertedResidualCell(4, 4, 2, 3, squeeze_excite=True).to(device).train()
    other = InvertedResidualCell(4, 4, 2, 3, squeeze_excite=True).to(device).train()
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")  # "inductor" takes 40 seconds
    x = torch.randn(2, 4, 5, 5, device=device)
    for module in (eager, compiled):
        module(x).square().sum().backward()
    for (key, a), (_, e) in zip(other.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad - e.grad).norm() <= 1e-4 * (e.grad.norm() + 1), key
    for key, value in eager.state_dict().items():
        if "running" in key:
            assert_close(other.state_dict()[key], value, 1e-6, key)
    assert int(other.state_dict()["ops.0.norm.num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    ("make", "size", "dtype", "message"),
    [
        (lambda: nf.nn.ConvBlock(4, 4), (2, 4, 4, 4), torch.float64, "parameters' dtype"),
        (lambda: nf.nn.ConvBlock(4, 4), (2, 5, 4, 4), torch.float32, "ConvBlock: x must have 4 channels"),
        (
            lambda: nf.nn.InvertedResidual(4, 4, expansion=2, kernel_size=3),
            (2, 4, 4, 4),
            torch.bfloat16,
            "parameters' dtype",
        ),
        (
            lambda: nf.nn.InvertedResidual(4, 8, 2, expansion=2, kernel_size=3),
            (1, 4, 2, 2),
            torch.float32,
            "more than one value",
        ),
        (
            lambda: nf.nn.InvertedResidualCell(4, 8, 2, 3, 2, groups=2),
            (1, 4, 2, 2),
            torch.float32,
            "more than one value",
        ),
        (
            lambda: nf.nn.InvertedResidualCell(4, 8, 2, 3, 2),
            (2, 5, 4, 4),
            torch.float32,
            "SkipDown: x must have 4 channels",
        ),
        (
            lambda: nf.nn.InvertedResidualCell(4, 8, 2, 3, 2),
            (4, 4, 4),
            torch.float32,
            "SkipDown: x must have shape",
        ),
        (
            lambda: nf.nn.InvertedResidualCell(4, 2, 2, 3, -1),
            (2, 5, 4, 4),
            torch.float32,
            "SkipUp: x must have 4 channels",
        ),
        (lambda: nf.nn.FlowCell(3), (2, 4, 4, 4), torch.float32, "WeightNormConv2d: x must have 3 channels"),
    ],
)
def test_a_call_that_fails_leaves_the_running_statistics(make, size, dtype, message) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        module(torch.randn(size, dtype=dtype))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_stride_2_skip_has_an_output_channel_for_each_convolution() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        nf.nn.SkipDown(2, 3)
