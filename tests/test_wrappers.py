"""The model inside nn.DataParallel and torch.export, and the types of its arguments and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import assert_close
from torch import nn

import nvae_fast as nf

CONFIG = nf.NVAEConfig(
    dataset="digits", arch_instance="res_mbconv", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1, num_nf=1,
    num_latent_per_group=2, num_preprocess_cells=1, num_postprocess_cells=1,
)  # fmt: skip


def model() -> nf.NVAE:
    torch.manual_seed(0)
    return nf.NVAE(CONFIG)


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["evaluated", "frozen"])
def test_an_exported_program_takes_any_batch(form: str, strict: bool) -> None:
    made: nn.Module = model().eval() if form == "evaluated" else nf.freeze(model())
    seed = torch.tensor(3)
    with torch.no_grad():
        program = torch.export.export(
            made, (images(4),), {"seed": seed}, dynamic_shapes=({0: torch.export.Dim("batch", max=64)}, {}),
            strict=strict,
        )  # fmt: skip
        for n in (2, 3, 40):
            found, expected = program.module()(images(n), seed=seed), made(images(n), seed=seed)
            assert isinstance(found, nf.NVAEOutput)
            assert_close(found.logits, expected.logits, 1e-5)
            assert_close(found.kl, expected.kl, 1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_cell_in_training_takes_any_batch(strict: bool) -> None:
    """With the running statistics of the batch that it is given."""
    torch.manual_seed(0)
    cell = nf.nn.InvertedResidualCell(4, 4, 3, 5, squeeze_excite=True)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(cell, (torch.rand(4, 4, 3, 3),), dynamic_shapes=shapes, strict=strict)
    exported, x = program.module(), torch.rand(6, 4, 3, 3)
    assert_close(exported(x), cell(x), 1e-5)
    found = dict(exported.named_buffers())
    for name, buffer in cell.named_buffers():
        assert_close(found[name].double(), buffer.double(), 1e-5, name)


def replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """What nn.DataParallel makes on each of several GPUs."""
    made = []
    for _ in range(count):
        of = {part: part._replicate_for_data_parallel() for part in module.modules()}
        for part, replica in of.items():
            for name, child in part._modules.items():
                setattr(replica, name, None if child is None else of[child])
            for name, parameter in part._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.view_as(parameter))  # no leaf, and no parameter
            for name, buffer in part._buffers.items():
                replica._buffers[name] = None if buffer is None else buffer.clone()
        made.append(of[module])
    return made


@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel(training: bool) -> None:
    made = model().double().train(training)
    x = images(4).double()
    outputs = [replica(x[2 * i : 2 * i + 2], seed=i) for i, replica in enumerate(replicas(made, 2))]
    sum(out.kl.sum() for out in outputs).backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    for i, out in enumerate(outputs):
        expected = made(x[2 * i : 2 * i + 2], seed=i)
        assert_close(out.logits, expected.logits, 1e-10)
        expected.kl.sum().backward()
    assert found.keys() == {name for name, p in made.named_parameters() if p.grad is not None}
    total = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]).norm()
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-9 * total, name


def test_what_data_parallel_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.parallel import scatter_gather

    class Gather:  # PyTorch's own is for GPUs
        apply = staticmethod(lambda device, dim, *tensors: torch.cat(tensors, dim))

    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    parts = [model()(images(2), seed=i) for i in range(2)]
    whole = scatter_gather.gather(parts, "cpu")
    assert isinstance(whole, nf.NVAEOutput)
    assert torch.equal(whole.logits, torch.cat([part.logits for part in parts]))


def test_numbers_of_numpy() -> None:
    made = model().eval()
    assert torch.equal(made.sample(np.int64(2), seed=1), made.sample(2, seed=1))
    with pytest.raises(ValueError, match="n must be an int >= 0, got"):
        made.sample(np.float32(2))


def test_an_array_is_named() -> None:
    with pytest.raises(TypeError, match=r"NVAE: x must be a torch.Tensor, got numpy.ndarray"):
        model()(np.zeros((2, 1, 32, 32), np.float32))


MODULES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "NVAE": lambda: (model(), images(2)),
    "InvertedResidualCell": lambda: (
        nf.nn.InvertedResidualCell(4, 4, 3, 5, squeeze_excite=True),
        torch.rand(2, 4, 3, 3),
    ),
    "InvertedResidual": lambda: (
        nf.nn.InvertedResidual(4, 4, expansion=3, kernel_size=5),
        torch.rand(2, 4, 3, 3),
    ),
    "ConvBlock": lambda: (nf.nn.ConvBlock(4, 4), torch.rand(2, 4, 3, 3)),
    "BatchNormSwish": lambda: (nf.nn.BatchNormSwish(4), torch.rand(2, 4, 3, 3)),
    "SqueezeExcite": lambda: (nf.nn.SqueezeExcite(4), torch.rand(2, 4, 3, 3)),
    "WeightNormConv2d": lambda: (nf.nn.WeightNormConv2d(4, 4, 3), torch.rand(2, 4, 3, 3)),
    "PlainConv2d": lambda: (nf.nn.PlainConv2d(4, 4, 3), torch.rand(2, 4, 3, 3)),
    "SkipDown": lambda: (nf.nn.SkipDown(4, 4), torch.rand(2, 4, 4, 4)),
    "SkipUp": lambda: (nf.nn.SkipUp(4, 4), torch.rand(2, 4, 4, 4)),
    "EncoderCombiner": lambda: (nf.nn.EncoderCombiner(4, 4), torch.rand(2, 4, 4, 4)),
    "FlowCell": lambda: (nf.nn.FlowCell(4), torch.rand(2, 4, 4, 4)),
}


def call(name: str, module: nn.Module, x: torch.Tensor) -> Any:
    return module(x, x) if "Combiner" in name else module(x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", MODULES)
def test_weights_that_are_not_floating_are_refused(name: str, dtype: torch.dtype) -> None:
    module, x = MODULES[name]()
    state = copy.deepcopy(module.state_dict())
    floating = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    state |= {key: state[key].to(dtype) for key in floating}
    before = {key: module.state_dict()[key].clone() for key in floating}
    with pytest.raises(TypeError, match=rf"load_state_dict: .*{dtype}"):
        module.load_state_dict(state)
    for key in floating:
        assert torch.equal(module.state_dict()[key], before[key]), f"{key} was written"
    for parent in list(module.modules()):
        for key, parameter in list(parent._parameters.items()):
            if parameter is not None:
                setattr(parent, key, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    with pytest.raises(TypeError, match=rf"must have one of the dtypes .*, got {dtype}"):
        call(name, module, x)
