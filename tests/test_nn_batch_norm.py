"""The running statistics of batch norms as PyTorch's tools use them: momentum, update_bn, conversions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import assert_close
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import nvae_fast as nf
from nvae_fast.nn import BatchNormSwish, InvertedResidualCell

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def batches(count: int = 3, channels: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2 + i, channels, 3, 3, generator=generator, dtype=torch.float64) * (i + 1) + i
        for i in range(count)
    ]


def assert_same_buffers(norm: nn.Module, expected: nn.Module) -> None:
    for name in BUFFERS:
        assert_close(getattr(norm, name).double(), getattr(expected, name).double(), 1e-12, name)


@pytest.mark.parametrize("momentum", [None, 0, 0.05, 1])
def test_momentum_as_in_pytorch(momentum: float | None) -> None:
    ours, theirs = (
        BatchNormSwish(4, momentum=momentum).double(),
        nn.BatchNorm2d(4, momentum=momentum).double(),
    )
    for x in batches():
        ours(x)
        theirs(x)
        assert_same_buffers(ours, theirs)
    ours.reset_running_stats()
    theirs.reset_running_stats()
    ours(batches()[2])
    theirs(batches()[2])
    assert_same_buffers(ours, theirs)


def test_the_cumulative_average_in_a_fused_cell(route: str) -> None:
    torch.manual_seed(0)
    cell = InvertedResidualCell(4, 4, 3, 5, squeeze_excite=True).double()
    norms = [part for part in cell.modules() if isinstance(part, BatchNormSwish)]
    latest: dict[nn.Module, list[list[torch.Tensor]]] = {norm: [] for norm in norms}
    for norm in norms:
        norm.momentum = 1.0  # the batch's own
    for x in batches():
        cell(x)
        for norm in norms:
            latest[norm].append([norm.running_mean.clone(), norm.running_var.clone()])
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    for x in batches():
        cell(x)
    for norm in norms:
        means, variances = zip(*latest[norm], strict=True)
        assert_close(norm.running_mean, torch.stack(means).mean(0), 1e-12)
        assert_close(norm.running_var, torch.stack(variances).mean(0), 1e-12)
        assert int(norm.num_batches_tracked) == 3


def test_different_momenta_in_a_cell() -> None:
    def variances(*momenta: float | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        cell = InvertedResidualCell(4, 4, 3, 5).double()
        for norm, momentum in zip(cell.ops[0].norms, momenta, strict=True):
            norm.momentum = momentum
        cell(batches()[0])
        return [norm.running_var for norm in cell.ops[0].norms]

    momenta = (0.05, None, 1.0, 0.3)
    of_the_batch = variances(1.0, 1.0, 1.0, 1.0)
    for found, batch, momentum in zip(variances(*momenta), of_the_batch, momenta, strict=True):
        weight = 1.0 if momentum is None else momentum
        assert_close(found, 1 - weight + weight * batch, 1e-12)


@pytest.mark.parametrize("bad", [-1.0, 2.0, float("nan"), float("inf"), -1e-9])
def test_momenta_outside_of_the_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="momentum must be from 0 to 1 or None, got"):
        BatchNormSwish(4, momentum=bad)
    norm = BatchNormSwish(4)
    with pytest.raises(ValueError, match="momentum must be from 0 to 1 or None, got"):
        norm.momentum = bad
    assert norm.momentum == 0.05


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"momentum": "0.1"}, TypeError, "momentum must be a number or None, got '0.1'"),
        ({"momentum": True}, TypeError, "momentum must be a number or None, got True"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be > 0, got nan"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"BatchNormSwish: {message}"):
        BatchNormSwish(4, **options)


def model() -> nf.NVAE:
    torch.manual_seed(0)
    return nf.NVAE(
        nf.NVAEConfig(
            dataset="digits",
            arch_instance="res_mbconv",
            num_channels_enc=4,
            num_channels_dec=4,
            num_groups_per_scale=1,
        )
    )


def test_update_bn_takes_the_statistics_of_all_batches() -> None:
    """Those of the weights that were averaged, as in PyTorch's own example of stochastic weight averaging."""
    averaged = AveragedModel(model())
    loader = [torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    first = next(m for m in averaged.module.modules() if isinstance(m, BatchNormSwish))
    seen: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    averaged.eval()
    update_bn(loader, averaged)
    handle.remove()
    assert first.momentum == 0.05
    assert not averaged.training
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    assert_close(first.running_mean, expected, 1e-5)
    for norm in averaged.modules():
        if isinstance(norm, BatchNormSwish):
            assert int(norm.num_batches_tracked) == 2


def test_the_conversion_that_would_drop_the_activation_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot be converted into a torch\.nn\.SyncBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormSwish(4, None))
    assert type(converted) is nn.SyncBatchNorm


def test_without_running_statistics_the_batch_has_its_own() -> None:
    """torch.func.replace_all_batch_norm_modules_ takes them away, as torch.func needs in training."""
    norm = BatchNormSwish(4).double()
    cell = InvertedResidualCell(4, 4, 3, 5).double()
    x = batches()[0]
    expected, expected_of_cell = norm(x), cell(x)
    for module in (norm, cell):
        torch.func.replace_all_batch_norm_modules_(module)
    for training in (True, False):
        assert_close(norm.train(training)(x), expected, 1e-12)
        assert_close(cell.train(training)(x), expected_of_cell, 1e-10)
    assert_close(nf.freeze(norm)(x), expected, 1e-12)


def test_resetting_its_parameters() -> None:
    norm = BatchNormSwish(4)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            tensor.fill_(3)
    norm.reset_parameters()
    for name, value in BatchNormSwish(4).state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name
    assert list(norm.state_dict()) == ["weight", "bias", *BUFFERS]
