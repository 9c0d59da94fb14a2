"""The training objective: the evidence bound with a warmed-up, balanced KL, plus two weighted regularisers.

    loss = mean_b( recon_b + balanced_kl_b ) + lambda * (spectral + batch_norm)

The KL coefficient c rises linearly from almost nothing to 1 during the first part of training. While c < 1
the groups are also *balanced*: a group that holds little information gets a small weight, one that holds much
gets a large weight, so that early in training no group is switched off for good. At c = 1 the loss is the
plain bound.

Everything here is a pure function; the pieces work on tensors of any device, never wait for the device, and
are exactly what `torch.compile` or a CUDA graph can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Smallest KL coefficient: with 0 the prior would get no gradient at all in the first steps.
KL_COEFFICIENT_FLOOR = 1e-4
# Added to every mean |KL| so that a collapsed group still gets a weight (and gradients) of its own.
KL_BALANCE_OFFSET = 0.01


class HasGroups(Protocol):
    """Anything with the number of groups of every scale, coarsest first (an `NVAEConfig` has it)."""

    @property
    def groups_per_scale(self) -> list[int]: ...


def kl_coefficient(
    step: float,
    total_steps: float,
    anneal_portion: float = 0.3,
    const_portion: float = 1e-4,
    const_coeff: float = KL_COEFFICIENT_FLOOR,
    max_coeff: float = 1.0,
) -> float:
    """The KL coefficient c at a step: `max(max_coeff * min((step - const) / anneal, 1), const_coeff)`.

    step, total_steps: position in the run and its length, in optimizer steps. anneal_portion, const_portion: the parts of the
    run (fractions) over which c rises, and before which it is constant. const_coeff, max_coeff: the smallest value of c, which
    is that of the constant part, and the largest, which it has from the end of the rise on. `anneal_portion=0` turns annealing
    off: c is max_coeff from the moment the constant part is over. Raises ValueError for a length that is not positive, a
    negative portion, or coefficients that are not `0 <= const_coeff <= max_coeff <= 1`. NVAE (arXiv 2007.03898), section 4 and
    appendix A.
    """
    if total_steps <= 0:
        raise ValueError(f"kl_coefficient: total_steps must be positive, got {total_steps}")
    if anneal_portion < 0 or const_portion < 0:
        raise ValueError(
            "kl_coefficient: anneal_portion and const_portion must not be negative, "
            f"got {anneal_portion} and {const_portion}"
        )
    if not 0 <= const_coeff <= max_coeff <= 1:
        raise ValueError(
            "kl_coefficient: expected 0 <= const_coeff <= max_coeff <= 1, "
            f"got const_coeff {const_coeff} and max_coeff {max_coeff}"
        )
    past_const = step - const_portion * total_steps
    anneal_steps = anneal_portion * total_steps
    if anneal_steps == 0:
        return max_coeff if past_const >= 0 else const_coeff
    return max(max_coeff * min(past_const / anneal_steps, 1.0), const_coeff)


def kl_alpha(config: HasGroups) -> list[float]:
    """The size weight of every group, top-down: `4^s / groups(s)` (s = 0 coarsest) over the smallest of them.

    A scale with four times the pixels is expected to hold four times the information, shared by its groups.
    """
    alpha = [
        4.0**scale / groups for scale, groups in enumerate(config.groups_per_scale) for _ in range(groups)
    ]
    smallest = min(alpha)
    return [a / smallest for a in alpha]


def kl_balance(kl: Tensor, config: HasGroups, *, average: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The balancing weights gamma, (G,), detached, of mean 1.

        gamma_i = mean_b |KL_i| + 0.01
        gamma_i = gamma_i / alpha_i * sum_j gamma_j          (the sum before this line)
        gamma_i = gamma_i / mean_j gamma_j

    kl: (B, G), groups top-down (coarsest scale first). average: applied to the (G,) batch mean, for example a
    mean over the processes of a data-parallel run. Computed in float32 (float64 for float64 input). config: an
    :class:`nvae_fast.NVAEConfig` or anything with its `groups_per_scale`; `alpha_i = 4^s / groups(s)` for a group of scale s,
    over the smallest of them. Raises TypeError or ValueError when kl is no floating (B, G) tensor. NVAE (arXiv 2007.03898),
    appendix A.
    """
    _check_kl("kl_balance", kl, config)
    size = full_precision(kl.detach()).abs().mean(0)
    if average is not None:
        size = average(size)
    size = size + KL_BALANCE_OFFSET
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    alpha = torch.cat([size.new_full((1,), value) for value in kl_alpha(config)])
    gamma = size / alpha * size.sum()
    return gamma / gamma.mean()


def balanced_kl(
    kl: Tensor,
    coefficient: float | Tensor,
    config: HasGroups,
    *,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The weighted KL of every image, (B,): `c * sum_i gamma_i KL_i` while c < 1, the plain sum at c = 1.

    kl: (B, G) in nats, groups top-down. coefficient: c as a float, or as a 0-d tensor on the same device
    (then both forms are computed and one is selected on the device: no host synchronisation). config, average: see
    `kl_balance`. Raises TypeError or ValueError when kl is no floating (B, G) tensor or the coefficient no scalar.
    """
    _check_kl("balanced_kl", kl, config)
    if not isinstance(coefficient, (int, float, Tensor)):
        raise TypeError(
            f"balanced_kl: coefficient must be a number or a 0-d tensor, got {type(coefficient).__name__}"
        )
    if isinstance(coefficient, Tensor):
        if coefficient.dim() != 0:
            raise ValueError(
                "balanced_kl: coefficient must be a number or a 0-d tensor, "
                f"got a tensor of shape {tuple(coefficient.shape)}"
            )
        gamma = kl_balance(kl, config, average=average)
        # One weight per group selected before the sum: a NaN in the form not chosen never reaches a gradient.
        weight = torch.where(coefficient < 1, coefficient.to(gamma.dtype) * gamma, torch.ones_like(gamma))
        return (kl * weight).sum(1)
    if coefficient < 1:
        return coefficient * (kl * kl_balance(kl, config, average=average)).sum(1)
    return kl.sum(1)


def annealed_lambda(coefficient: float, value: float, initial: float | None = None) -> float:
    """The regularisers' weight: `exp((1 - c) log initial + c log value)`, or `value` with no initial one.

    coefficient: c, the KL coefficient of the step, 0 to 1. Raises ValueError when value or initial is not positive.
    """
    if initial is None:
        return value
    if value <= 0 or initial <= 0:
        raise ValueError(
            f"annealed_lambda: value and initial must be greater than 0, got {value} and {initial}"
        )
    return math.exp((1.0 - coefficient) * math.log(initial) + coefficient * math.log(value))


def full_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_kl(name: str, kl: Tensor, config: HasGroups) -> None:
    if not hasattr(config, "groups_per_scale"):
        raise TypeError(
            f"{name}: config must be an NVAEConfig or have its groups_per_scale, got {type(config).__name__}"
        )
    groups = sum(config.groups_per_scale)
    if not isinstance(kl, Tensor) or kl.dim() != 2 or kl.shape[1] != groups:
        got = f"shape {tuple(kl.shape)}" if isinstance(kl, Tensor) else type(kl).__name__
        raise ValueError(
            f"{name}: kl must be a tensor of shape (B, {groups}), one column per group; got {got}"
        )
    if not kl.is_floating_point():
        raise TypeError(f"{name}: kl must be a floating-point tensor, got {kl.dtype}")
