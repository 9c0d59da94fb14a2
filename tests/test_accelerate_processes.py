"""Accelerated models over two processes: synchronised batch norms see what one process sees on everything, others what their
own process has; also in whole cells, which communicate in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign_cells import accelerated, counted, of_layers, plain_layers
from foreign_model import Tower, local
from harness import assert_close
from torch import nn

import nvae_fast as nf

SHARES = (slice(0, 3), slice(3, 8))


def one_pass(part: slice, place: int = 0) -> dict[str, torch.Tensor]:
    """A cell of the miniature, all of whose batch norms are synchronised ones: ``place`` 2 runs in one call."""
    torch.manual_seed(1)
    cell = nf.accelerate(Tower(8).double().enc[place]).train()
    c = 8 if place == 0 else 16
    x, upstream = (torch.randn(8, c, 6, 5, dtype=torch.float64)[part] for _ in range(2))
    x = (x * 3 + 20).requires_grad_()
    with counted() as calls:
        y = cell(x)
    assert len(calls) == (place == 2)
    (y * upstream).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in cell.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients, **{n: b.clone() for n, b in cell.named_buffers()}}


def whole_cell(part: slice, synchronised: bool, group: object = None) -> dict[str, torch.Tensor]:
    """A cell in PyTorch's layers, in one call; of synchronised ones PyTorch itself has no CPU version for two processes."""
    torch.manual_seed(2)
    cell = of_layers(*plain_layers()).double()
    if synchronised:
        cell = nn.SyncBatchNorm.convert_sync_batchnorm(cell, process_group=group)
    if group is not None:  # one more that sees its own process
        first = cell._ops[0][0]
        cell._ops[0][0] = nn.BatchNorm2d(12).double()
        cell._ops[0][0].load_state_dict(first.state_dict())
    cell = accelerated(cell)
    torch.manual_seed(1)
    x, upstream = (torch.randn(8, 12, 5, 4, dtype=torch.float64)[part] for _ in range(2))
    x = (x * 3 + 20).requires_grad_()
    with counted() as calls:
        y = cell(x)
    assert calls, nf.acceleration_report(cell)
    (y * upstream).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in cell.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients, **{n: b.clone() for n, b in cell.named_buffers()}}


def mixed_cell() -> str:
    """Two of four batch norms synchronised: not in one call."""
    cell = nf.accelerate(local(Tower(8).double().enc[2])).train()
    with counted() as calls:
        cell(torch.randn(2, 16, 6, 5, dtype=torch.float64))
    assert not calls
    return dict(nf.acceleration_report(cell).notes)[""]


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    found = {
        "parts": one_pass(SHARES[rank]),
        "family": one_pass(SHARES[rank], 2),
        "synchronised": whole_cell(SHARES[rank], True),
        "nothing here": whole_cell(slice(0, 8 * rank), True),
        "own group": whole_cell(SHARES[rank], True, alone),
        "local": whole_cell(SHARES[rank], False),
        "mixed": mixed_cell(),
    }
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("which", ["parts", "family", "synchronised", "nothing here"])
def test_two_processes_are_one(which: str, both: list[dict[str, Any]]) -> None:
    first, second = both[0][which], both[1][which]
    places = {"parts": 0, "family": 2}
    whole = one_pass(slice(None), places[which]) if which in places else whole_cell(slice(None), True)
    largest = max(float(value.norm()) for name, value in whole.items() if name.startswith("grad"))
    for name, value in whole.items():
        if name in ("y", "grad x"):
            actual = torch.cat([first[name], second[name]])
        elif name.startswith("grad"):
            actual = first[name] + second[name]
        else:
            actual = first[name]
            assert torch.equal(actual, second[name]), name
        if name.endswith("num_batches_tracked"):
            assert int(actual) == int(value) == 1
        elif (
            float(value.norm()) > 1e-10 * largest
        ):  # a bias before a batch norm has gradient zero but for rounding
            assert_close(actual, value, 1e-10, name)


@pytest.mark.parametrize("which", ["own group", "local"])
def test_batch_norms_that_are_not_synchronised_see_their_own(which: str, both: list[dict[str, Any]]) -> None:
    for rank, share in enumerate(SHARES):
        for name, value in whole_cell(share, False).items():
            assert_close(both[rank][which][name], value, 1e-12, name)


def test_mixed_cells_run_part_by_part(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "do not take statistics over the same processes" in found["mixed"]
