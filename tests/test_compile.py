"""torch.compile: the whole model is one graph, cells compile without a break, and a compiled model trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from training_runs import TINY, tiny_model

import nvae_fast as nf
from nvae_fast.models.architectures import make_cell
from nvae_fast.nn import FlowCell, ResidualCell
from nvae_fast.training import Step, TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALLEST = {**TINY, "image_size": 16, "num_groups_per_scale": 2, "use_se": True}


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 1e-3) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(floor))


def close(compiled: nn.Module, plain: nn.Module, tolerance: float) -> None:
    """Gradients and running statistics agree."""
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert error(a.grad, b.grad, 1e-2) < tolerance, name
    for (name, a), b in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        assert error(a.double(), b.double()) < tolerance, name


@pytest.mark.parametrize("changes", [{}, {"dataset": "photos", "num_nf": 1}])
def test_the_whole_model_is_one_graph(changes: dict):
    """Through AOTAutograd, which traces the backward pass too; without code generation, to keep it short."""
    model = tiny_model(**{**SMALLEST, **changes}).train()
    x = torch.rand(2, model.config.channels, 16, 16).round()
    with torch.no_grad():
        model(x, seed=1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for number in range(2):
        seed = torch.tensor(number)
        outs = [f(x, seed=seed) for f in (compiled, twin)]
        for out, m in zip(outs, (model, twin), strict=True):
            (out.kl.sum() + m.reconstruction_loss(out.logits, x).sum()).backward()
        assert error(outs[0].logits, outs[1].logits) < 1e-5
        assert error(outs[0].kl, outs[1].kl) < 1e-5
    close(model, twin, 1e-3)


# 1x1 convolutions are matrix products where channels are a multiple of 16.
WIDE = {**SMALLEST, "num_channels_enc": 16, "num_channels_dec": 16}


def test_the_whole_model_is_one_graph_under_autocast():
    """Forward and backward in bfloat16: as near to float32 as the model itself, within a factor of two."""
    model = tiny_model(**WIDE).train()
    x = torch.rand(2, 1, 16, 16).round()
    found = []
    for compiled, mixed in ((True, True), (False, True), (False, False)):
        own = copy.deepcopy(model)
        f = torch.compile(own, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else own
        # A compiled model has PyTorch's own bfloat16 convolutions. Ours lose less on some processors.
        own_convolutions = nf.use_backend("reference") if mixed and not compiled else nullcontext()
        with own_convolutions, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = f(x, seed=torch.tensor(1))
        assert out.logits.dtype == (torch.bfloat16 if mixed else torch.float32)
        (out.kl.sum() + own.reconstruction_loss(out.logits, x).sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
        statistics = torch.cat([b.flatten() for b in own.buffers() if b.is_floating_point()])
        found.append((out.logits.float(), out.kl, gradient, statistics))
    for compiled, itself, truth in zip(*found, strict=True):
        assert error(compiled, truth) < 2 * error(itself, truth)


def test_autocast_goes_on_after_compiled_cells():
    """Also where their products are matrix products, in either pass."""
    cells = nn.Sequential(
        nf.nn.InvertedResidualCell(16, 16, 3, 5, -1),
        nf.nn.InvertedResidualCell(16, 32, 3, 3, 2),
        nf.nn.InvertedResidualCell(32, 32, 6, 5, squeeze_excite=True),
        nn.Conv2d(32, 16, 1),
    )

    def function(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        with torch.autocast("cpu", torch.bfloat16):
            return cells(x), torch.is_autocast_enabled("cpu")

    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    found = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        leaf = x.clone().requires_grad_()
        y, still = f(leaf)
        assert still
        assert y.dtype == torch.bfloat16
        found.append((y.float(), *torch.autograd.grad(y.float().square().sum(), (leaf, *cells.parameters()))))
    flat = [torch.cat([t.flatten() for t in ts]) for ts in found]
    assert error(*flat) < 2**-8  # a rounding to bfloat16


CELLS = {  # channels and the cell; code is generated for one kind, which takes most of the time of this file
    "inverted": (4, "inductor", lambda: nf.nn.InvertedResidualCell(4, 4, 3, 5, squeeze_excite=True)),
    "inverted up": (4, "aot_eager", lambda: nf.nn.InvertedResidualCell(4, 2, 3, 5, -1)),
    "regular": (4, "aot_eager", lambda: make_cell(("res_bnswish", "res_bnswish"), 4, 4, 1, True)),
    "regular down": (4, "aot_eager", lambda: make_cell(("res_bnswish", "res_bnswish"), 4, 8, 2, True)),
    "flow": (2, "aot_eager", lambda: FlowCell(2)),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_without_a_break(name: str):
    channels, backend, make = CELLS[name]
    cell = make().train()
    twin = copy.deepcopy(cell)
    x = torch.randn(2, channels, 6, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a = torch.compile(cell, backend=backend, fullgraph=True, dynamic=False)(x)
    b = twin(y)
    upstream = torch.randn_like(b)
    (a * upstream).sum().backward()
    (b * upstream).sum().backward()
    assert error(a, b) < 1e-5
    assert error(x.grad, y.grad) < 1e-4
    close(cell, twin, 1e-4)


def test_a_model_with_compiled_cells_trains():
    """Cells of one kind share their graphs; checkpointed or not, the numbers are those of the plain model."""
    x = torch.rand(2, 1, 16, 16).round()
    for checkpointed in (False, True):
        config = TrainingConfig(checkpoint_cells=checkpointed)
        models = [tiny_model(**SMALLEST).train() for _ in range(2)]
        for part in models[0].modules():
            if isinstance(part, ResidualCell):
                part.compile(backend="aot_eager", dynamic=False)
        steps = [Step(model, config) for model in models]
        for number in range(3):
            a, b = (s(x, seed=number, coefficient=0.5, weight=0.01, learning_rate=1e-3) for s in steps)
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)
        for c, d in zip(*(m.buffers() for m in models), strict=True):
            assert error(c.double(), d.double()) < 1e-3
