"""weight_norm and weight_norm_many: normalised weights of one layer, and of many by one call."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, sample

SIZES = [(4, 3, 3, 3), (1, 1, 1, 1), (7, 5, 1, 1), (17, 1, 5, 5), (3, 130, 3, 3)]


def inputs(size: tuple[int, ...] = (4, 3, 3, 3), masked: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    found = {
        "weight": torch.randn(size, generator=generator, dtype=torch.float64),
        "log_weight_norm": 0.5 * torch.randn((size[0], 1, 1, 1), generator=generator, dtype=torch.float64),
    }
    if masked:
        found["mask"] = (torch.rand(size, generator=generator) < 0.6).double()
        found["mask"].view(size[0], -1)[:, :1] = 1
    return found


def formula(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    masked = weight if mask is None else weight * mask
    return torch.exp(log_weight_norm) * masked / (masked.square().sum((1, 2, 3), keepdim=True).sqrt() + eps)


def both(size: tuple[int, ...], label: Any) -> list[Any]:
    return [sample(f"{label} masked={masked}", inputs(size, masked)) for masked in (False, True)]


W, N = torch.ones(4, 3, 3, 3), torch.zeros(4, 1, 1, 1)
ERRORS = [
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"weight": torch.ones(4, 3)}, ValueError, r"weight must have shape \(C_out, C_in, K, K\), got \(4, 3\)"),
    (
        {"log_weight_norm": torch.zeros(4)},
        ValueError,
        r"log_weight_norm must have shape \(4, 1, 1, 1\), got \(4,\)",
    ),
    ({"log_weight_norm": N.to("meta")}, ValueError, "log_weight_norm must be on cpu .*got meta"),
    (
        {"mask": torch.ones(4, 3, 3, 1)},
        ValueError,
        r"mask must have shape \(4, 3, 3, 3\), got \(4, 3, 3, 1\)",
    ),
    ({"mask": W.bool()}, TypeError, "mask must have one of the dtypes .*got torch.bool"),
    ({"eps": "small"}, ValueError, "eps must be >= 0, got 'small'"),
    ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
]

# Many layers by one call: tensors are numbered by layer.

MANY_SIZES = [(4, 3, 3, 3), (9, 2, 1, 1), (7, 5, 1, 1), (17, 1, 5, 5), (3, 130, 3, 3), (40, 33, 1, 1)]
MASKED = (1, 3, 4)  # positions in MANY_SIZES
PARTS = {"weight": "weights", "log_weight_norm": "log_weight_norms", "mask": "masks"}


def layers(sizes: list[tuple[int, ...]], masked: tuple[int, ...] = ()) -> Tensors:
    return {
        f"{part}_{i}": t
        for i, size in enumerate(sizes)
        for part, t in inputs(size, masked=i in masked).items()
    }


def lists(tensors: Tensors) -> dict[str, list[torch.Tensor | None]]:
    """The arguments of weight_norm_many."""
    number = sum(name.startswith("weight_") for name in tensors)
    return {name: [tensors.get(f"{part}_{i}") for i in range(number)] for part, name in PARTS.items()}


def many(dtype: torch.dtype | None = None, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(nf.weight_norm_many(**lists(tensors), dtype=dtype))


def many_formula(dtype: torch.dtype | None = None, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = [formula(*layer) for layer in zip(*lists(tensors).values(), strict=True)]
    return tuple(y if dtype is None or y.dtype == torch.float64 else y.to(dtype) for y in found)


MANY_ERRORS = [
    ({"log_weight_norms": [N]}, ValueError, r"log_weight_norms must have one entry per weight \(2\), got 1"),
    ({"masks": [None]}, ValueError, r"masks must have one entry per weight \(2\), got 1"),
    ({"weights": [W, None]}, TypeError, "layer 1: weight must be a torch.Tensor, got NoneType"),
    (
        {"weights": [W, W[0]]},
        ValueError,
        r"layer 1: weight must have shape \(C_out, C_in, K, K\), got \(3, 3, 3\)",
    ),
    (
        {"log_weight_norms": [N, N[:3]]},
        ValueError,
        r"layer 1: log_weight_norm must have shape \(4, 1, 1, 1\)",
    ),
    ({"masks": [None, W.bool()]}, TypeError, "layer 1: mask must have one of the dtypes .*got torch.bool"),
    (
        {"weights": [W, W.to("meta")], "log_weight_norms": [N, N.to("meta")]},
        ValueError,
        "layer 1: weight must be on cpu like the first argument, got meta",
    ),
    ({"weights": None}, TypeError, "weights must be a sequence with one entry a layer, got NoneType"),
    ({"masks": 3}, TypeError, "masks must be a sequence with one entry a layer, got int"),
    ({"eps": None}, ValueError, "eps must be >= 0, got None"),
    ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
    ({"dtype": torch.int32}, TypeError, r"dtype must be None or one of .*got torch.int32"),
]
SMALL_SIZES: list[tuple[int, ...]] = [(2, 3, 1, 1), (3, 2, 3, 1), (2, 1, 2, 2), (1, 2, 2, 1)]
NUMBERED = tuple(f"{part}_{i}" for i in range(len(MANY_SIZES)) for part in ("weight", "log_weight_norm"))

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    NORMS = torch.randn(4, 1, 1, 1, dtype=torch.float64)

DESCRIPTIONS = [
    Description(
        "weight_norm",
        nf.weight_norm,
        formula,
        samples=[one for size in SIZES for one in both(size, size)],
        small=both((3, 2, 3, 1), "odd") + both((3, 2, 3, 3), "3x3"),
        layouts=both((5, 3, 5, 5), "5x5"),
        differentiable=("weight", "log_weight_norm"),
        batched=("weight", "log_weight_norm", "mask"),
        results=(INPUT,),
        factor=2.5,
        float64=(1e-12, 1e-10),  # a 1x1x1 weight's gradient cancels to eps
        errors=ERRORS,
        good={"weight": W, "log_weight_norm": N},
        poison={"weight": (2, 1, 0, 0)},
        single=(lambda x: nf.weight_norm(x, NORMS[: x.shape[0]]), (4, 3, 3)),
    ),
    Description(
        "weight_norm_many",
        many,
        many_formula,
        samples=[sample("six layers", layers(MANY_SIZES, MASKED))],
        small=[
            sample("some masks", layers(SMALL_SIZES, (1, 3))),
            sample("no masks", layers([(3, 2, 3, 3), (2, 4, 1, 1)])),
            sample("all masks", layers([(3, 2, 3, 3), (2, 4, 1, 1)], (0, 1))),
        ],
        layouts=[sample("six layers", layers(MANY_SIZES, MASKED))],
        differentiable=NUMBERED,
        batched=tuple(f"{part}_{i}" for i in range(len(MANY_SIZES)) for part in PARTS),
        results=(INPUT,) * len(MANY_SIZES),
        factor=2.5,
        float64=(1e-10, 1e-10),
        errors=MANY_ERRORS,
        good={"weights": [W, W], "log_weight_norms": [N, N]},
        call=nf.weight_norm_many,
        poison={"weight_0": (2, 1, 0, 0)},
        single=(lambda x: nf.weight_norm_many([x, 2 * x], [NORMS[: x.shape[0]]] * 2)[1], (4, 3, 3)),
        halved=(),  # each layer has a dtype of its own: tests/test_weight_norm_many.py
    ),
]
