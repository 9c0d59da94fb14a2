"""What several test files share: recorded numbers, error measures, poisoned outputs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


@cache
def _archive(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


class Record:
    """Recorded official numbers under a prefix: ``record["train/logits"]`` is a tensor."""

    def __init__(self, name: str, prefix: str = "") -> None:
        self.name, self.prefix = name, prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(_archive(self.name)[self.prefix + key]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every entry below ``prefix``, by the rest of its key."""
        full = self.prefix + prefix
        return {k[len(full) :]: self[k[len(self.prefix) :]] for k in _archive(self.name) if k.startswith(full)}

    def sub(self, prefix: str) -> Record:
        return Record(self.name, self.prefix + prefix)

    @property
    def args(self) -> dict:
        return json.loads(bytes(_archive(self.name)["args.json"]))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64 (the norm of the difference where expected is all zero)."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    scale = expected.norm()
    return float((actual - expected).norm() / (scale if scale > 0 else 1.0))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "value") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} exceeds {tolerance:.3g}"


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The specification's two measures of training gradients: all as one vector 2e-5, each one 5e-4 of
    ``max(|g|, 1e-4 |all|)`` (some are analytically zero)."""
    assert actual.keys() == expected.keys()
    flat = torch.cat([expected[k].double().reshape(-1) for k in expected])
    flat_actual = torch.cat([actual[k].double().reshape(-1) for k in expected])
    assert_close(flat_actual, flat, 2e-5, "all gradients as one vector")
    total = flat.norm()
    for key in expected:
        error = (actual[key].double() - expected[key].double()).norm()
        bound = 5e-4 * max(expected[key].double().norm(), 1e-4 * total)
        assert error <= bound, f"gradient of {key}: error {error:.3g} exceeds {bound:.3g}"
