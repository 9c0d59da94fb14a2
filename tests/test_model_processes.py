"""A whole NVAE over two and three processes: gradients, statistics, losses and results of one process on everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_close
from processes import Exchanges, part_of, together
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.training import Step, TrainingConfig, evaluate
from nvae_fast.training.distributed import World
from nvae_fast.training.pictures import draw_images

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 8
SHARES = {2: {"unequal": (3, 5), "empty": (8, 0)}, 3: {"unequal": (2, 1, 5), "empty": (3, 0, 5)}}
# (model, dtype, backend); the second is made of plain batch norms, the last has none and is initialised by the data.
CASES = {
    "cells fp64": ({}, torch.float64, "reference"),
    "cells fp32": ({}, torch.float32, "auto"),
    "blocks fp64": ({"arch_instance": "res_bnswish"}, torch.float64, "reference"),
    "blocks fp32": ({"arch_instance": "res_bnswish"}, torch.float32, "auto"),
}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
OPTIONS = TrainingConfig(batch_size=IMAGES, cuda_graph=False)
PARTS = (1, 2, 4)
EVALUATIONS = {"batch 4": 4, "batch 5": 5}


@contextmanager
def case(name: str) -> Iterator[tuple[nf.NVAE, torch.Tensor, torch.Tensor]]:
    """Model, images and one noise seed an image, the same in every process."""
    changes, dtype, backend = CASES[name]
    model = tiny_model(3, image_size=16, **changes).to(dtype).train()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gammas of one, betas of zero would hide much
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    x = torch.rand(IMAGES, 1, 16, 16, generator=generator).round().to(dtype)
    with nf.use_backend(backend):
        yield model, x, torch.arange(100, 100 + IMAGES)


def one_step(
    name: str, part: slice, world: World, config: TrainingConfig = OPTIONS, *, frozen: bool = False
) -> dict[str, Any]:
    """One step. frozen: with batch norm in evaluation mode, where parts of a batch do not see each other."""
    with case(name) as (model, x, seeds):
        model.train(not frozen)
        step = Step(model, config, world)
        update, gradients = step.update, {}

        def watched(rate: Any) -> None:
            gradients.update({key: p.grad.clone() for key, p in model.named_parameters()})
            update(rate)

        step.update = watched
        with Exchanges() as exchanges:
            result = step(x[part], seed=seeds[part], coefficient=0.4, weight=0.1, learning_rate=0.01)
        assert not result.skipped
        state = {key: value.clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}
        return {"result": result, "gradients": gradients, "state": state, "exchanges": exchanges.names}


def sharded(world: World) -> dict[str, Any]:
    """Evaluation and sampling, whose results must not depend on how many processes share them."""
    digits = nf.data.open_dataset("digits", split="test")
    found: dict[str, Any] = {}
    model = tiny_model(3)
    for name, size in EVALUATIONS.items():
        found[name] = evaluate(model, digits, samples=2, batch_size=size, max_images=14, seed=5, world=world)
    for name, changes in {"digits": {}, "photos": {"dataset": "photos", "image_size": 16}}.items():
        model = tiny_model(3, **changes)
        for size in (3, 4):
            found[f"{name} {size}"] = draw_images(
                model, 10, batch_size=size, seed=6, pixels="sample", world=world
            )
    return found


def work(rank: int, size: int) -> dict[Any, Any]:
    world = World(rank, size, torch.device("cpu"))
    found: dict[Any, Any] = {"sharded": sharded(world)}
    for name in CASES:
        for shares, parts in SHARES[size].items():
            found[name, shares] = one_step(name, part_of(parts, rank), world)
    for parts in SHARES[size].values():
        for accumulate in PARTS:
            config = OPTIONS.replace(kl_balance=False, accumulate=accumulate)
            part = part_of(parts, rank)
            found["parts", parts, accumulate] = one_step("cells fp64", part, world, config, frozen=True)
    with pytest.raises(
        ValueError, match=f"differ in --data, of which process {rank} of {size} has {10 + rank}: "
    ):
        world.agree({"--batch-size": 4, "--data": 10 + rank})
    return found


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return together(work, request.param, Path(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("shares", ["unequal", "empty"])
@pytest.mark.parametrize("name", CASES)
def test_processes_are_one(several: list[dict], name: str, shares: str) -> None:
    tolerance = TOLERANCE[CASES[name][1]]
    whole = one_step(name, slice(None), World())
    largest = torch.cat([g.flatten() for g in whole["gradients"].values()]).norm() / len(whole["gradients"])
    for found in several:
        part = found[name, shares]
        for field in ("loss", "reconstruction", "kl", "spectral", "batch_norm", "grad_norm"):
            expected = getattr(whole["result"], field)
            assert getattr(part["result"], field) == pytest.approx(expected, rel=tolerance), field
        channels = whole["result"].kl_per_channel
        assert part["result"].kl_per_channel == pytest.approx(
            channels, rel=tolerance, abs=tolerance * max(channels)
        )
        for key, expected in whole["gradients"].items():
            error = float((part["gradients"][key] - expected).norm() / max(expected.norm(), 0.1 * largest))
            assert error <= tolerance, f"gradient {key}: {error:.3g}"
        for key, expected in whole["state"].items():
            if "running" in key or "spectral" in key:
                assert_close(part["state"][key], expected, tolerance, key)
            assert torch.equal(part["state"][key], several[0][name, shares]["state"][key]), key


def test_parts_of_a_step_add_up(several: list[dict]) -> None:
    """With images of unequal number and parts that may be empty; gradients travel once, with the last part."""
    config = OPTIONS.replace(kl_balance=False)
    whole = one_step("cells fp64", slice(None), World(), config, frozen=True)
    for parts in SHARES[len(several)].values():
        for found in several:
            exchanges = [found["parts", parts, accumulate]["exchanges"] for accumulate in PARTS]
            assert exchanges[0] == exchanges[1] == exchanges[2]
            assert exchanges[0] == ["allreduce_.default"] * 3, (
                "number of images, gradients, numbers to report"
            )
            for accumulate in PARTS:
                part = found["parts", parts, accumulate]
                assert part["result"].loss == pytest.approx(whole["result"].loss, rel=1e-9)
                assert part["result"].kl_per_channel == pytest.approx(
                    whole["result"].kl_per_channel, rel=1e-9
                )
                for key, expected in whole["gradients"].items():
                    torch.testing.assert_close(
                        part["gradients"][key], expected, rtol=1e-7, atol=1e-9, msg=key
                    )


def test_results_do_not_depend_on_processes(several: list[dict]) -> None:
    alone = sharded(World())
    for rank, found in enumerate(several):
        for name in EVALUATIONS:
            assert found["sharded"][name] == alone[name], name
        for name in ("digits 3", "digits 4", "photos 3", "photos 4"):
            expected = alone[name] if rank == 0 else alone[name][:0]
            assert torch.equal(found["sharded"][name], expected), name


def test_results_hardly_depend_on_the_batch_size() -> None:
    found = sharded(World())
    one, two = (found[name].to_dict() for name in EVALUATIONS)
    assert one.pop("kl_per_group") == pytest.approx(two.pop("kl_per_group"), rel=1e-5)
    assert one == pytest.approx(two, rel=1e-5)
    torch.testing.assert_close(found["photos 3"], found["photos 4"], rtol=1e-4, atol=1e-4)
    same = (found["digits 3"] == found["digits 4"]).float().mean()
    assert same > 0.999, "binary pixels, of which rounding may turn one"
