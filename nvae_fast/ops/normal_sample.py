"""Sample a squashed normal: ``z = mu + temperature * sigma * eps`` with packed raw parameters.

``mu = c(raw_mu)``, ``sigma = exp(c(raw_log_sigma)) + sigma_floor``, ``c(t) = clamp * tanh(t / clamp)``; NVAE
(arXiv 2007.03898), section 4, for the temperature of the prior when generating.

Gradients, which the kernels compute from the inputs and the seed alone: mu gets ``g``, sigma ``g temperature eps``, eps
``g temperature sigma``, and the raw parameters those times d mu / d raw = 1 - (mu / clamp)^2 and d sigma / d raw =
(sigma - floor)(1 - (u / clamp)^2) at the clamped log sigma u.
"""

from __future__ import annotations

from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import define_op
from nvae_fast.ops._squash import draw_like, squash, unpack


def normal_sample(
    params: Tensor,
    *,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    clamp: float | None = 5.0,
    sigma_floor: float = 0.01,
) -> Tensor:
    """Draw ``z`` (B, Z, H, W), in the dtype of ``params``.

    Args:
        params: packed raw parameters (B, 2Z, H, W).
        temperature: factor on sigma, >= 0; 0 gives the mean.
        noise: standard normal draws (B, Z, H, W); None draws them from ``seed``.
        seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator.
        clamp, sigma_floor: as in :func:`nvae_fast.residual_normal`.

    Differentiable in params and noise.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a shape, device or value does not fit, or both noise and seed are given.
    """
    op = "normal_sample"
    _checks.packed(op, "params", params)
    _checks.temperature(op, temperature, zero=True)
    _checks.squashing(op, clamp, sigma_floor)
    draw_from = _checks.noise_or_seed(op, params, noise, seed)
    return _op(params, noise, draw_from, temperature, clamp, sigma_floor)


def _reference(
    params: Tensor, noise: Tensor | None, seed: Tensor | None, temperature: float, clamp: float | None,
    sigma_floor: float,
) -> Tensor:  # fmt: skip
    mu, sigma = squash(*unpack(params), clamp, sigma_floor)
    return (mu + temperature * sigma * draw_like(params, noise, seed)).to(params.dtype)


_op = define_op(
    "normal_sample",
    _reference,
    fake=lambda params, *_: empty_map(params, params.shape[1] // 2),
    differentiable=("params", "noise"),
    outputs=("z",),
    triton="normal_sample",
    fused_backward=True,
)
