"""normal_sample in Triton; formulas are the docstring of nvae_fast/ops/normal_sample.py.

Forward reads 2 Z values a pixel and writes Z, backward reads Z more and writes up to 3 Z; the noise is drawn from
the seed both times, unless it is given. Arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.map_launch import Map
from nvae_fast.kernels.maps import (
    PIXELS,
    lanes,
    load,
    log_sigma_channel,
    normals,
    offsets,
    store,
)
from nvae_fast.kernels.pointwise import squash, squash_with_derivatives


@triton.jit(do_not_specialize=["seed", "batches", "rows"])
def forward_kernel(
    parameters, noise, seed, z,
    batches, channels, pixels, chunks, rows, temperature, floor,
    params_batch, params_step, noise_batch, noise_step, z_batch, z_step,
    CLAMP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``noise`` or ``seed`` is None."""
    COUNT: tl.constexpr = TILE[PIXELS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    at = first + pixel
    mask = inside & (at < pixels)
    raw_mu = load(parameters, offsets(b, c, at, params_batch, params_step, TILE), params_step, mask, TILE)
    raw_ls = load(parameters, offsets(b, c_ls, at, params_batch, params_step, TILE), params_step, mask, TILE)
    if noise is not None:
        eps = load(noise, offsets(b, c, at, noise_batch, noise_step, TILE), noise_step, mask, TILE)
    else:
        eps = normals(seed, b, c, first, pixel, channels, pixels, TILE)
    z_at = offsets(b, c, at, z_batch, z_step, TILE)
    for k in tl.static_range(COUNT):
        mu, sigma = squash(raw_mu[k], raw_ls[k], floor, CLAMP)
        store(z, z_at, z_step, k, tl.fma(temperature * sigma, eps[k], mu), mask, TILE)


@triton.jit(do_not_specialize=["seed", "batches", "rows"])
def backward_kernel(
    grad_z, parameters, noise, seed, grad_params, grad_noise,
    batches, channels, pixels, chunks, rows, temperature, floor,
    z_batch, z_step, params_batch, params_step, noise_batch, noise_step, packed_batch, packed_step, map_batch, map_step,
    CLAMP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``noise`` or ``seed`` is None, and a gradient that is not wanted."""
    COUNT: tl.constexpr = TILE[PIXELS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    at = first + pixel
    mask = inside & (at < pixels)
    g = load(grad_z, offsets(b, c, at, z_batch, z_step, TILE), z_step, mask, TILE)
    raw_mu = load(parameters, offsets(b, c, at, params_batch, params_step, TILE), params_step, mask, TILE)
    raw_ls = load(parameters, offsets(b, c_ls, at, params_batch, params_step, TILE), params_step, mask, TILE)
    if noise is not None:
        eps = load(noise, offsets(b, c, at, noise_batch, noise_step, TILE), noise_step, mask, TILE)
    else:
        eps = normals(seed, b, c, first, pixel, channels, pixels, TILE)
    packed_mu = offsets(b, c, at, packed_batch, packed_step, TILE)
    packed_ls = offsets(b, c_ls, at, packed_batch, packed_step, TILE)
    map_at = offsets(b, c, at, map_batch, map_step, TILE)
    for k in tl.static_range(COUNT):
        _, sigma, d_mu, d_ls = squash_with_derivatives(raw_mu[k], raw_ls[k], floor, CLAMP)
        scaled = g[k] * temperature
        if grad_params is not None:
            store(grad_params, packed_mu, packed_step, k, g[k] * d_mu, mask, TILE)
            store(grad_params, packed_ls, packed_step, k, scaled * eps[k] * d_ls, mask, TILE)
        if grad_noise is not None:
            store(grad_noise, map_at, map_step, k, scaled * sigma, mask, TILE)


def normal_sample(
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
) -> torch.Tensor:
    """z of the operator's arguments."""
    space = Map("normal_sample", params, packed=True)
    z = space.empty()
    if space.count:
        inputs = [space.view(t) for t in (params, noise)]
        launch = space.launch(*inputs, sums=False)
        launch.run(
            forward_kernel,
            *(view.tensor for view in inputs), seed, z,
            *launch.sizes, float(temperature), float(sigma_floor), *launch.strides(*inputs, space.dense()),
            CLAMP=float(clamp or 0),
        )  # fmt: skip
    return z


def normal_sample_backward(
    grad_z: torch.Tensor,
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
    need_params: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of params and noise; an empty tensor for one that is not wanted."""
    space = Map("normal_sample", params, packed=True)
    grad_params = space.empty(2) if need_params else None
    grad_noise = space.empty(1, noise.dtype) if need_noise and noise is not None else None
    if space.count and (grad_params is not None or grad_noise is not None):
        inputs = [space.view(t) for t in (grad_z, params, noise)]
        launch = space.launch(*inputs, sums=False)
        launch.run(
            backward_kernel,
            *(view.tensor for view in inputs), seed, grad_params, grad_noise,
            *launch.sizes, float(temperature), float(sigma_floor),
            *launch.strides(*inputs, space.dense(2), space.dense()),
            CLAMP=float(clamp or 0),
        )  # fmt: skip
    noise_dtype = params.dtype if noise is None else noise.dtype
    return (
        params.new_empty(0) if grad_params is None else grad_params,
        params.new_empty(0, dtype=noise_dtype) if grad_noise is None else grad_noise,
    )
