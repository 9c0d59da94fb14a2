"""Batch norm and data-dependent initialisation over two processes: the same as one process on everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import assert_close
from torch import nn

import nvae_fast as nf
from nvae_fast.nn import BatchNormSwish, ConvBlock, InvertedResidualCell

SHARES = {"unequal": (3, 5), "empty": (0, 8)}


def make_cell(dtype: torch.dtype) -> nn.Module:
    """A cell with negative gammas, the same in every process."""
    torch.manual_seed(3)
    cell = InvertedResidualCell(6, 6, 3, 5, squeeze_excite=True).to(dtype).train()
    with torch.no_grad():
        for module in cell.modules():
            if isinstance(module, BatchNormSwish):
                module.weight.normal_()
                module.bias.normal_()
    return cell


def one_pass(cell: nn.Module, part: slice, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, upstream = (
        torch.randn(8, 6, 5, 7, generator=generator, dtype=torch.float64).to(dtype)[part] for _ in range(2)
    )
    x = (x * 3 + 20).requires_grad_()
    y = cell(x)
    (y * upstream).sum().backward()
    return {
        "y": y.detach(),
        "grad x": x.grad,
        **{f"grad {key}": parameter.grad for key, parameter in cell.named_parameters()},
        **{f"state {key}": value.clone() for key, value in cell.state_dict().items() if "running" in key},
    }


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for name, shares in SHARES.items():
        part = slice(0, shares[0]) if rank == 0 else slice(shares[0], 8)
        for dtype in (torch.float32, torch.float64):
            results[name, dtype] = one_pass(make_cell(dtype), part, dtype)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    cell = nf.nn.set_process_group(make_cell(torch.float64), alone)
    results["own group"] = one_pass(cell, slice(0, 3) if rank == 0 else slice(3, 8), torch.float64)

    torch.manual_seed(5)
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").double().train()
    x = (
        torch.randn(8, 6, 9, 9, dtype=torch.float64)
        * torch.linspace(1, 3, 8, dtype=torch.float64)[:, None, None, None]
    )
    block(x[rank::2])
    results["initialised"] = {key: value.clone() for key, value in block.state_dict().items()}
    torch.manual_seed(5)
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").double().train()
    block(x[:0] if rank == 0 else x)
    results["initialised by one"] = {key: value.clone() for key, value in block.state_dict().items()}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(worker, args=(str(directory),), nprocs=2)
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shares", SHARES)
def test_two_processes_are_one(
    shares: str, dtype: torch.dtype, tolerance: float, two_processes: list[dict]
) -> None:
    """Values, gradients and running statistics of merged batches equal those of one process on the whole
    batch."""
    whole = one_pass(make_cell(dtype), slice(0, 8), dtype)
    parts = [found[shares, dtype] for found in two_processes]
    total = torch.cat(
        [whole[key].flatten() for key in whole if key.startswith("grad") and key != "grad x"]
    ).norm()
    for key, expected in whole.items():
        if key in ("y", "grad x"):
            assert_close(torch.cat([part[key] for part in parts]), expected, tolerance, key)
        elif key.startswith("grad"):
            merged = sum(part[key] for part in parts)
            error = float((merged - expected).norm() / max(expected.norm(), 0.05 * total))
            assert error <= tolerance, f"{key}: {error:.3g}"  # some are analytically zero
        else:
            for part in parts:
                assert_close(part[key], expected, tolerance, key)
            assert torch.equal(parts[0][key], parts[1][key]), "every process holds the same statistics"


def test_statistics_of_a_given_group(two_processes: list[dict]) -> None:
    """A process whose group is itself computes as if it were alone."""
    for found, part in zip(two_processes, (slice(0, 3), slice(3, 8)), strict=True):
        for key, expected in one_pass(make_cell(torch.float64), part, torch.float64).items():
            assert_close(found["own group"][key], expected, 1e-12, key)


def test_initialisation_averages_over_processes(two_processes: list[dict]) -> None:
    torch.manual_seed(5)
    block = ConvBlock(6, 5, batch_norm=False, activation="elu").double()
    x = (
        torch.randn(8, 6, 9, 9, dtype=torch.float64)
        * torch.linspace(1, 3, 8, dtype=torch.float64)[:, None, None, None]
    )
    weight = block.conv.weight / (block.conv.weight.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-5)
    outputs = [F.conv2d(F.elu(x[rank::2]), weight, padding=1) for rank in range(2)]
    mean = sum(y.mean((0, 2, 3)) for y in outputs) / 2
    spread = 5 * sum(y.std((0, 2, 3)) for y in outputs) / 2
    for found in two_processes:
        assert_close(found["initialised"]["conv.bias"], -mean / (spread + 1e-5), 1e-10)
        assert_close(found["initialised"]["conv.log_weight_norm"].flatten(), -torch.log(spread + 1e-5), 1e-10)
    block.train()(x)
    for found in two_processes:
        for key, value in found["initialised by one"].items():
            assert_close(
                value, block.state_dict()[key], 1e-10, f"{key}: a process without images does not count"
            )
