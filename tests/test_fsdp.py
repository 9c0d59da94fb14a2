"""FSDP2 over two processes: models sharded by cell, as a whole, or both, compute what unsharded ones do."""

from __future__ import annotations

import copy
from typing import Any

import foreign_model
import pytest
import torch
import torch.distributed as dist
from harness import assert_close
from processes import part_of, together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import nvae_fast as nf

CONFIG = nf.NVAEConfig(
    dataset="digits", arch_instance="res_mbconv", num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1, num_nf=1,
    num_latent_per_group=2, num_preprocess_cells=1, num_postprocess_cells=1,
)  # fmt: skip
SHARDED = ("cells", "model", "cells and model")


def our_model() -> nn.Module:
    torch.manual_seed(0)
    return nf.NVAE(CONFIG).double()


def their_model() -> nn.Module:
    torch.manual_seed(0)
    return foreign_model.local(foreign_model.Tower().double())


def shard(model: nn.Module, which: str, size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (size,))
    if "cells" in which:
        for part in model.modules():
            if isinstance(part, (nf.nn.ResidualCell, foreign_model.Cell)):
                fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh) if "model" in which else model


def step(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """The loss of this process, the gradients averaged over processes, the running statistics."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, nf.NVAE):
        x = torch.rand(4, 1, 32, 32, generator=generator, dtype=torch.float64)[part_of((2, 2), rank)]
        out = model(x, seed=torch.tensor([1, 2]) + 2 * rank)
        loss = out.kl.sum() + model.reconstruction_loss(out.logits, x).sum() + sum(model.regularization())
    else:
        x = torch.rand(4, 3, 12, 8, generator=generator, dtype=torch.float64)[part_of((2, 2), rank)]
        loss = model(x).square().sum()
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if hasattr(grad, "full_tensor"):
            found[f"grad {name}"] = grad.full_tensor()
        else:
            found[f"grad {name}"] = grad / dist.get_world_size()
            dist.all_reduce(found[f"grad {name}"])
    return found | {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def work(rank: int, size: int) -> dict[str, Any]:
    results: dict[str, Any] = {"ours": step(our_model(), rank), "theirs": step(their_model(), rank)}
    results["accelerated"] = step(nf.accelerate(their_model()), rank)
    for which in SHARDED:
        results[f"ours {which}"] = step(shard(our_model(), which, size), rank)
    results["accelerated, then sharded"] = step(shard(nf.accelerate(their_model()), SHARDED[-1], size), rank)
    model = nf.accelerate(shard(their_model(), SHARDED[-1], size))
    report = nf.acceleration_report(model)
    results["report"] = report.replaced, report.left
    results["sharded, then accelerated"] = step(model, rank)
    with torch.device("meta"):
        model = nf.NVAE(CONFIG).double()
    model = shard(model, SHARDED[-1], size)
    model.to_empty(device="cpu")
    whole = our_model().state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in whole:
            own = tensor.detach()
            mesh = getattr(own, "device_mesh", None)
            own.copy_(whole[name] if mesh is None else distribute_tensor(whole[name], mesh, own.placements))
    for part in model.modules():
        part.needs_data_init = False
    results["from meta"] = step(model, rank)
    torch.manual_seed(0)
    model = nf.NVAE(CONFIG.replace(arch_instance="res_elu"))
    x = torch.rand(2, 1, 32, 32)
    sharded = shard(copy.deepcopy(model), "model", size)
    try:
        sharded(x)
    except RuntimeError as error:
        results["awaiting data"] = str(error)
    model(x, seed=1)
    expected = model(x, seed=1).logits
    results["initialised before"] = (shard(model, "model", size)(x, seed=1).logits - expected).abs().max()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(work, 2, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize(
    "sharded, whole",
    [
        *((f"ours {which}", "ours") for which in SHARDED),
        ("from meta", "ours"),
        ("accelerated, then sharded", "accelerated"),
        ("sharded, then accelerated", "theirs"),
    ],
)
def test_sharded_models_compute_the_same(sharded: str, whole: str, both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found[sharded].keys() == found[whole].keys()
        gradients = torch.cat([v.flatten() for k, v in found[whole].items() if k.startswith("grad")])
        for name, expected in found[whole].items():
            if name.startswith("grad"):  # some are zero in exact arithmetic
                error = (found[sharded][name] - expected).norm() / max(
                    expected.norm(), 1e-3 * gradients.norm()
                )
                assert error <= 1e-9, f"{name}: {error:.3g}"
            else:
                assert_close(found[sharded][name], expected, 1e-10, name)


def test_what_is_sharded_is_left_with_the_reason(both: list[dict[str, Any]]) -> None:
    for found in both:
        replaced, left = found["report"]
        assert replaced == []
        reasons = dict(left)
        assert "is a DTensor" in reasons["enc.0"], "a cell is known by the class that was sharded"
        assert all("call accelerate before fully_shard" in reason for reason in reasons.values())


def test_initialisation_from_data_is_not_lost(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "call the model once in training mode before fully_shard" in found["awaiting data"]
        assert found["initialised before"] <= 1e-5
