"""normal_log_prob in Triton; formulas are the docstring of nvae_fast/ops/normal_log_prob.py.

Forward reads 3 Z values a pixel and adds up over pixels; backward reads them again and writes up to 3 Z.
Arithmetic is float32; two runs are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.map_launch import Map, Sums, no_sums
from nvae_fast.kernels.maps import (
    BY_CHANNELS,
    ITERATIONS,
    PIXELS,
    SPAN,
    fold_product,
    fold_sum,
    lane_sums,
    lanes,
    load,
    log_product,
    log_sigma_channel,
    multiply,
    of_sums,
    offsets,
    store,
    sum_places,
    zero_sums,
)
from nvae_fast.kernels.pointwise import LOG_SQRT_2PI, inverse, shared_logs, squash, squash_with_derivatives


@triton.jit
def _terms(
    value, raw_mu, raw_ls, floor, HAS_PARAMS: tl.constexpr, CLAMP: tl.constexpr, SHARED_LOGS: tl.constexpr
):
    """One element: ``w^2 + 2 log sigma``, and sigma, whose logarithm is still missing there with SHARED_LOGS."""
    if HAS_PARAMS:
        mu, sigma = squash(raw_mu, raw_ls, floor, CLAMP)
        w = (value - mu) * inverse(sigma, CLAMP)
    else:
        sigma = tl.zeros_like(value) + (1.0 + floor)
        w = value / (1.0 + floor)
    term = w * w
    if not SHARED_LOGS:
        term += 2.0 * tl.log(sigma)
    return term, sigma


@triton.jit(do_not_specialize=["batches", "rows"])
def forward_kernel(
    z, parameters, out,
    batches, channels, pixels, chunks, rows, floor,
    z_batch, z_step, params_batch, params_step,
    CLAMP: tl.constexpr, SHARED_LOGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``parameters`` may be None. SHARED_LOGS: four sigmas may be multiplied before a logarithm is taken."""
    COUNT: tl.constexpr = TILE[PIXELS]
    TIMES: tl.constexpr = TILE[ITERATIONS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    total = zero_sums(TILE)
    sigmas = zero_sums(TILE) + 1.0  # the logarithm of this product is to be added
    sigmas_power = zero_sums(TILE).to(tl.int32)
    for i in range(TIMES):
        start = first + i * TILE[SPAN]
        at = start + pixel
        mask = inside & (at < pixels)
        here = mask if TILE[BY_CHANNELS] else inside
        value = load(z, offsets(b, c, at, z_batch, z_step, TILE), z_step, mask, TILE)
        raw_mu = value
        raw_ls = value
        if parameters is not None:
            raw_mu = load(
                parameters, offsets(b, c, at, params_batch, params_step, TILE), params_step, mask, TILE
            )
            raw_ls = load(
                parameters, offsets(b, c_ls, at, params_batch, params_step, TILE), params_step, mask, TILE
            )
        term, sigma = _terms(
            value[0], raw_mu[0], raw_ls[0], floor, parameters is not None, CLAMP, SHARED_LOGS
        )
        for k in tl.static_range(1, COUNT):
            term_k, sigma_k = _terms(
                value[k], raw_mu[k], raw_ls[k], floor, parameters is not None, CLAMP, SHARED_LOGS
            )
            term += term_k
            sigma *= sigma_k
        total += fold_sum(term, start, pixels, here, TILE)
        if SHARED_LOGS:
            sigma = fold_product(sigma, start, pixels, here, TILE)
            sigmas, sigmas_power = multiply(sigmas, sigmas_power, sigma, TILE)
    if SHARED_LOGS:
        total += 2.0 * log_product(sigmas, sigmas_power, TILE)
    place, there, counted = sum_places(batches, channels, pixels, chunks, rows, TILE)
    tl.store(out + place, -0.5 * lane_sums(total, TILE) - LOG_SQRT_2PI * counted.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["batches", "rows"])
def backward_kernel(
    grad, z, parameters, grad_z, grad_params,
    batches, channels, pixels, chunks, rows, floor,
    z_batch, z_step, params_batch, params_step, map_batch, map_step, packed_batch, packed_step, sums_batch, sums_step,
    CLAMP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``parameters`` may be None, and a gradient that is not wanted."""
    COUNT: tl.constexpr = TILE[PIXELS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    at = first + pixel
    mask = inside & (at < pixels)
    value = load(z, offsets(b, c, at, z_batch, z_step, TILE), z_step, mask, TILE)
    if parameters is not None:
        raw_mu = load(parameters, offsets(b, c, at, params_batch, params_step, TILE), params_step, mask, TILE)
        raw_ls = load(
            parameters, offsets(b, c_ls, at, params_batch, params_step, TILE), params_step, mask, TILE
        )
    g = of_sums(grad, b, c, sums_batch, sums_step, inside, TILE)
    map_at = offsets(b, c, at, map_batch, map_step, TILE)
    packed_mu = offsets(b, c, at, packed_batch, packed_step, TILE)
    packed_ls = offsets(b, c_ls, at, packed_batch, packed_step, TILE)
    for k in tl.static_range(COUNT):
        if parameters is not None:
            mu, sigma, d_mu, d_ls = squash_with_derivatives(raw_mu[k], raw_ls[k], floor, CLAMP)
            one_over = inverse(sigma, CLAMP)
            w = (value[k] - mu) * one_over
        else:
            one_over = 1.0 / (1.0 + floor)
            w = value[k] * one_over
        scaled = g * one_over
        if grad_z is not None:
            store(grad_z, map_at, map_step, k, -scaled * w, mask, TILE)
        if grad_params is not None:
            store(grad_params, packed_mu, packed_step, k, scaled * w * d_mu, mask, TILE)
            store(grad_params, packed_ls, packed_step, k, scaled * tl.fma(w, w, -1.0) * d_ls, mask, TILE)


def normal_log_prob(
    z: torch.Tensor, params: torch.Tensor | None, clamp: float | None, sigma_floor: float
) -> torch.Tensor:
    """The log-density (B, Z) of the operator's arguments."""
    space = Map("normal_log_prob", z, packed=False)
    if space.count == 0:
        return no_sums(space, 1)[0]
    inputs = [space.view(t) for t in (z, params)]
    launch = space.launch(*inputs, sums=True)
    sums = Sums(launch, 1)
    launch.run(
        forward_kernel,
        *(view.tensor for view in inputs), *sums.targets,
        *launch.sizes, float(sigma_floor), *launch.strides(*inputs),
        CLAMP=float(clamp or 0), SHARED_LOGS=shared_logs(clamp, sigma_floor),
    )  # fmt: skip
    return sums.finish()[0]


def normal_log_prob_backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    params: torch.Tensor | None,
    clamp: float | None,
    sigma_floor: float,
    need_z: bool,
    need_params: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of z and params; an empty tensor for one that is not wanted."""
    space = Map("normal_log_prob", z, packed=False)
    grad_z = space.empty() if need_z else None
    grad_params = space.empty(2, params.dtype) if need_params and params is not None else None
    if space.count and (grad_z is not None or grad_params is not None):
        inputs = [space.view(t) for t in (z, params)]
        launch = space.launch(*inputs, sums=False)
        launch.run(
            backward_kernel,
            grad, *(view.tensor for view in inputs), grad_z, grad_params,
            *launch.sizes, float(sigma_floor), *launch.strides(*inputs, space.dense(), space.dense(2)), *grad.stride(),
            CLAMP=float(clamp or 0),
        )  # fmt: skip
    return (
        z.new_empty(0) if grad_z is None else grad_z,
        z.new_empty(0, dtype=(z if params is None else params).dtype) if grad_params is None else grad_params,
    )
