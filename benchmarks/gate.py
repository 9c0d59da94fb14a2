"""The correctness gate: no provider is timed before its outputs and gradients agree with the float64
reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs
from benchmarks.providers import Candidate, Execution
from nvae_fast.ops.philox import philox_normal

NOISE_SEED = 77
MOMENT_DEVIATIONS = 6.0  # standard errors


@dataclass
class Verdict:
    """Whether a provider passed, its largest relative errors, the bound, and in words what is wrong."""

    passed: bool
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def finite(errors: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which knows no infinity: None in its place."""
    return {name: error if math.isfinite(error) else None for name, error in errors.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, outliers: float = 0.0) -> float:
    """``||actual - expected|| / ||expected||`` in float64; infinite for another shape or a value that is not
    finite. The fraction ``outliers`` of elements with the largest errors is left out."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.detach().double() - expected.detach().double()).abs().flatten()
    if not torch.isfinite(difference).all():
        return float("inf")
    dropped = int(outliers * difference.numel())
    if dropped:
        difference = difference.sort().values[:-dropped]
    scale = expected.detach().double().norm()
    return float(difference.norm() / (scale if scale > 0 else 1.0))


class Gate:
    """The float64 truth of one case, shape and dtype, and the judgement of providers against it."""

    def __init__(
        self, case: Case, inputs: Inputs, noise_size: tuple[int, ...] | None, dtype: torch.dtype
    ) -> None:
        self.case, self.inputs, self.dtype = case, inputs, dtype
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        self._noise = None
        with nf.use_backend("reference"):
            if noise_size is not None:
                self._noise = philox_normal(noise_size, NOISE_SEED, device=device)
            self._truth = Execution(case, case.run, inputs, dtype=dtype, double=True).both()
            self._truth_given = self._truth
            if self._noise is not None:
                given = {**inputs, "noise": self._noise}
                self._truth_given = Execution(case, case.run, given, dtype=dtype, double=True).both()

    def judge(self, candidate: Candidate) -> Verdict:
        """Run ``candidate`` once (which also compiles it) and compare. Exceptions are the caller's."""
        assert candidate.run is not None
        case, library = self.case, self.case.library if candidate.library else None
        tolerance = case.tolerances[self.dtype]
        if library is not None and library.tolerance is not None:
            tolerance = max(tolerance, library.tolerance)
        inputs, truth = self.inputs, self._truth
        if candidate.noise_given and self._noise is not None:
            inputs, truth = {**inputs, "noise": self._noise}, self._truth_given
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        with candidate.context(device):
            execution = Execution(
                case, candidate.run, inputs, dtype=self.dtype, memory_format=candidate.memory_format
            )
            outputs, gradients = execution.both()
        if library is not None and library.moments:
            return _moments(outputs[0])
        errors = {}
        names = [f"output {i}" for i in range(len(truth[0]))] + [
            f"gradient of {name}" for name in case.differentiable
        ]
        actual, expected = (*outputs, *gradients), (*truth[0], *truth[1])
        if len(actual) != len(expected):
            return Verdict(False, tolerance, {}, f"{len(outputs)} outputs, expected {len(truth[0])}")
        for name, a, e in zip(names, actual, expected, strict=True):
            errors[name] = relative_error(a, e, case.outliers)
        wrong = [
            f"{name}: relative error {error:.2g}" for name, error in errors.items() if not error <= tolerance
        ]
        reason = f"{'; '.join(wrong)} (allowed {tolerance:.2g})" if wrong else ""
        return Verdict(not wrong, tolerance, errors, reason)


def _moments(draws: torch.Tensor) -> Verdict:
    """Mean and variance within a few standard errors of those of N(0, 1)."""
    values = draws.double().flatten()
    count = values.numel()
    errors = {
        "mean, in standard errors": abs(float(values.mean())) * count**0.5,
        "variance, in standard errors": abs(float(values.var()) - 1.0) * (count / 2) ** 0.5,
    }
    wrong = [f"{name}: {error:.2g}" for name, error in errors.items() if not error <= MOMENT_DEVIATIONS]
    reason = f"{'; '.join(wrong)} (allowed {MOMENT_DEVIATIONS:g})" if wrong else ""
    return Verdict(not wrong, MOMENT_DEVIATIONS, errors, reason)
