"""An accelerated model over two processes: the synchronised batch norms see what one process sees on everything."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from foreign_model import Tower
from harness import assert_close

import nvae_fast as nf

SHARES = (slice(0, 3), slice(3, 8))


def one_pass(part: slice) -> dict[str, torch.Tensor]:
    """The encoder of the miniature, all of whose batch norms with swish are synchronised ones."""
    torch.manual_seed(1)
    cell = nf.accelerate(Tower(8).double().enc[0]).train()
    x, upstream = (torch.randn(8, 8, 6, 5, dtype=torch.float64)[part] for _ in range(2))
    x = (x * 3 + 20).requires_grad_()
    y = cell(x)
    (y * upstream).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in cell.named_parameters()}
    return {"y": y.detach(), "grad x": x.grad, **gradients, **{n: b.clone() for n, b in cell.named_buffers()}}


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.save(one_pass(SHARES[rank]), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = one_pass(slice(None))
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
