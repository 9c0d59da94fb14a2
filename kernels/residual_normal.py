"""residual_normal in Triton; formulas are the docstring of nvae_fast/ops/residual_normal.py.

Forward reads the packed parameters in either memory format, draws or reads the noise, writes z and adds kl, log_q and
log_p up over pixels, in one kernel: 4 Z reads and Z writes a pixel. Backward computes everything again from the same inputs
and the seed and writes the gradients that are wanted, in one kernel: Z reads more, up to 4 Z writes. Arithmetic is float32;
two runs are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.map_launch import Map, Sums, View, no_sums
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
    normals,
    of_sums,
    offsets,
    store,
    sum_places,
    zero_sums,
)
from nvae_fast.kernels.pointwise import LOG_SQRT_2PI, inverse, shared_logs, squash, squash_with_derivatives


@triton.jit
def _terms(
    raw_mu_q, raw_ls_q, raw_mu_p, raw_ls_p, eps, floor,
    HAS_PRIOR: tl.constexpr, RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, SHARED_LOGS: tl.constexpr,
):  # fmt: skip
    """One element: z; what it adds to 2 kl, -2 log_q and -2 log_p but for their constants; sigma_q / sigma_p and sigma_q,
    whose logarithms are still missing there with SHARED_LOGS."""
    if HAS_PRIOR:
        if RESIDUAL:
            raw_mu_q = raw_mu_q + raw_mu_p
            raw_ls_q = raw_ls_q + raw_ls_p
        mu_p, sigma_p = squash(raw_mu_p, raw_ls_p, floor, CLAMP)
        mu_q, sigma_q = squash(raw_mu_q, raw_ls_q, floor, CLAMP)
        inverse_p = inverse(sigma_p, CLAMP)
        distance = (mu_q - mu_p) * inverse_p
    else:
        mu_q, sigma_q = squash(raw_mu_q, raw_ls_q, floor, CLAMP)
        sigma_p = 1.0 + floor
        inverse_p = inverse(sigma_p, CLAMP)
        distance = mu_q * inverse_p
    ratio = sigma_q * inverse_p
    w = tl.fma(ratio, eps, distance)
    kl = tl.fma(distance, distance, tl.fma(ratio, ratio, -1.0))
    log_q = eps * eps
    log_p = w * w
    if not SHARED_LOGS:
        kl -= 2.0 * tl.log(ratio)
        log_q += 2.0 * tl.log(sigma_q)
        log_p += 2.0 * tl.log(sigma_p)
    return tl.fma(sigma_q, eps, mu_q), kl, log_q, log_p, ratio, sigma_q


@triton.jit(do_not_specialize=["seed", "batches", "rows"])
def forward_kernel(
    posterior, prior, noise, seed, z, out_kl, out_log_q, out_log_p,
    batches, channels, pixels, chunks, rows, floor,
    q_batch, q_step, p_batch, p_step, noise_batch, noise_step, z_batch, z_step,
    RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, SHARED_LOGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``prior`` and ``noise`` may be None. SHARED_LOGS: four sigmas may be multiplied before a logarithm is taken."""
    HAS_PRIOR: tl.constexpr = prior is not None
    COUNT: tl.constexpr = TILE[PIXELS]
    TIMES: tl.constexpr = TILE[ITERATIONS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    sum_kl = zero_sums(TILE)
    sum_log_q = zero_sums(TILE)
    sum_log_p = zero_sums(TILE)
    ratios = zero_sums(TILE) + 1.0  # the logarithms of these products are to be added
    sigmas = zero_sums(TILE) + 1.0
    ratios_power = zero_sums(TILE).to(tl.int32)
    sigmas_power = zero_sums(TILE).to(tl.int32)
    for i in range(TIMES):
        start = first + i * TILE[SPAN]
        at = start + pixel
        mask = inside & (at < pixels)
        here = mask if TILE[BY_CHANNELS] else inside
        # Drawn before the loads, which would hold registers meanwhile: the more warps cover the latency instead.
        if noise is not None:
            eps = load(noise, offsets(b, c, at, noise_batch, noise_step, TILE), noise_step, mask, TILE)
        else:
            eps = normals(seed, b, c, start, pixel, channels, pixels, TILE)
        q_mu = load(posterior, offsets(b, c, at, q_batch, q_step, TILE), q_step, mask, TILE)
        q_ls = load(posterior, offsets(b, c_ls, at, q_batch, q_step, TILE), q_step, mask, TILE)
        if HAS_PRIOR:
            p_mu = load(prior, offsets(b, c, at, p_batch, p_step, TILE), p_step, mask, TILE)
            p_ls = load(prior, offsets(b, c_ls, at, p_batch, p_step, TILE), p_step, mask, TILE)
        else:
            p_mu = q_mu
            p_ls = q_ls
        z_at = offsets(b, c, at, z_batch, z_step, TILE)
        value, kl, log_q, log_p, ratio, sigma_q = _terms(
            q_mu[0], q_ls[0], p_mu[0], p_ls[0], eps[0], floor, HAS_PRIOR, RESIDUAL, CLAMP, SHARED_LOGS
        )
        store(z, z_at, z_step, 0, value, mask, TILE)
        if SHARED_LOGS:
            # Adds 0, or NaN where log_q is NaN: what descends from loads alone has their layout, and without this a
            # compiler moves the draws through shared memory, to the layout it would have chosen for log_q.
            log_q += sigma_q - sigma_q
        for k in tl.static_range(1, COUNT):
            value, kl_k, log_q_k, log_p_k, ratio_k, sigma_q_k = _terms(
                q_mu[k], q_ls[k], p_mu[k], p_ls[k], eps[k], floor, HAS_PRIOR, RESIDUAL, CLAMP, SHARED_LOGS
            )
            store(z, z_at, z_step, k, value, mask, TILE)
            kl += kl_k
            log_q += log_q_k
            log_p += log_p_k
            ratio *= ratio_k
            sigma_q *= sigma_q_k
        sum_kl += fold_sum(kl, start, pixels, here, TILE)
        sum_log_q += fold_sum(log_q, start, pixels, here, TILE)
        sum_log_p += fold_sum(log_p, start, pixels, here, TILE)
        if SHARED_LOGS:
            ratios, ratios_power = multiply(
                ratios, ratios_power, fold_product(ratio, start, pixels, here, TILE), TILE
            )
            sigmas, sigmas_power = multiply(
                sigmas, sigmas_power, fold_product(sigma_q, start, pixels, here, TILE), TILE
            )
    if SHARED_LOGS:
        log_ratio = 2.0 * log_product(ratios, ratios_power, TILE)
        log_sigma_q = 2.0 * log_product(sigmas, sigmas_power, TILE)
        sum_kl -= log_ratio
        sum_log_q += log_sigma_q
        sum_log_p += log_sigma_q - log_ratio
    place, there, counted = sum_places(batches, channels, pixels, chunks, rows, TILE)
    constant = LOG_SQRT_2PI * counted.to(tl.float32)
    tl.store(out_kl + place, 0.5 * lane_sums(sum_kl, TILE), mask=there)
    tl.store(out_log_q + place, -0.5 * lane_sums(sum_log_q, TILE) - constant, mask=there)
    tl.store(out_log_p + place, -0.5 * lane_sums(sum_log_p, TILE) - constant, mask=there)


@triton.jit(do_not_specialize=["seed", "batches", "rows"])
def backward_kernel(
    grad_z, grad_kl, grad_log_q, grad_log_p, posterior, prior, noise, seed, grad_posterior, grad_prior, grad_noise,
    batches, channels, pixels, chunks, rows, floor,
    q_batch, q_step, p_batch, p_step, noise_batch, noise_step, z_batch, z_step, packed_batch, packed_step, map_batch,
    map_step, kl_batch, kl_step, log_q_batch, log_q_step, log_p_batch, log_p_step,
    RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every tensor but the posterior may be None: a gradient that is not there costs nothing."""
    HAS_PRIOR: tl.constexpr = prior is not None
    # What has a gradient at all: without one, no NaN may come from 0 * NaN.
    THROUGH_Z: tl.constexpr = grad_z is not None or grad_log_p is not None
    THROUGH_PRIOR: tl.constexpr = grad_kl is not None or grad_log_p is not None
    COUNT: tl.constexpr = TILE[PIXELS]
    b, c, first, pixel, inside = lanes(batches, channels, chunks, TILE)
    c_ls = log_sigma_channel(c, channels, TILE)
    at = first + pixel
    mask = inside & (at < pixels)
    if noise is not None:
        eps = load(noise, offsets(b, c, at, noise_batch, noise_step, TILE), noise_step, mask, TILE)
    else:
        eps = normals(seed, b, c, first, pixel, channels, pixels, TILE)
    q_mu = load(posterior, offsets(b, c, at, q_batch, q_step, TILE), q_step, mask, TILE)
    q_ls = load(posterior, offsets(b, c_ls, at, q_batch, q_step, TILE), q_step, mask, TILE)
    if HAS_PRIOR:
        p_mu = load(prior, offsets(b, c, at, p_batch, p_step, TILE), p_step, mask, TILE)
        p_ls = load(prior, offsets(b, c_ls, at, p_batch, p_step, TILE), p_step, mask, TILE)
    if grad_z is not None:
        g_z = load(grad_z, offsets(b, c, at, z_batch, z_step, TILE), z_step, mask, TILE)
    if grad_kl is not None:
        g_kl = of_sums(grad_kl, b, c, kl_batch, kl_step, inside, TILE)
    if grad_log_q is not None:
        g_q = of_sums(grad_log_q, b, c, log_q_batch, log_q_step, inside, TILE)
    if grad_log_p is not None:
        g_p = of_sums(grad_log_p, b, c, log_p_batch, log_p_step, inside, TILE)
    packed_mu = offsets(b, c, at, packed_batch, packed_step, TILE)
    packed_ls = offsets(b, c_ls, at, packed_batch, packed_step, TILE)
    for k in tl.static_range(COUNT):
        raw_mu_q = q_mu[k]
        raw_ls_q = q_ls[k]
        if HAS_PRIOR:
            if RESIDUAL:
                raw_mu_q = raw_mu_q + p_mu[k]
                raw_ls_q = raw_ls_q + p_ls[k]
            mu_p, sigma_p, d_mu_p, d_ls_p = squash_with_derivatives(p_mu[k], p_ls[k], floor, CLAMP)
            mu_q, sigma_q, d_mu_q, d_ls_q = squash_with_derivatives(raw_mu_q, raw_ls_q, floor, CLAMP)
            inverse_p = inverse(sigma_p, CLAMP)
            distance = (mu_q - mu_p) * inverse_p
        else:
            mu_q, sigma_q, d_mu_q, d_ls_q = squash_with_derivatives(raw_mu_q, raw_ls_q, floor, CLAMP)
            inverse_p = 1.0 / (1.0 + floor)
            distance = mu_q * inverse_p
        inverse_q = inverse(sigma_q, CLAMP)
        ratio = sigma_q * inverse_p
        # What reaches z, and then mu_q, sigma_q, mu_p, sigma_p; see _backward_formula in nvae_fast/ops/residual_normal.py.
        into_z = tl.zeros_like(mu_q)
        if grad_z is not None:
            into_z = g_z[k]
        to_mu_p = tl.zeros_like(mu_q)
        to_sigma_p = tl.zeros_like(mu_q)
        if grad_log_p is not None:
            w = tl.fma(ratio, eps[k], distance)
            to_mu_p = g_p * w * inverse_p
            to_sigma_p = g_p * tl.fma(w, w, -1.0)
            into_z = into_z - to_mu_p
        to_mu_q = into_z
        to_sigma_q = tl.zeros_like(mu_q)
        into_eps = tl.zeros_like(mu_q)
        if THROUGH_Z:
            to_sigma_q = into_z * eps[k]
            into_eps = into_z * sigma_q
        if grad_log_q is not None:
            to_sigma_q -= g_q * inverse_q
            into_eps -= g_q * eps[k]
        if grad_kl is not None:
            from_kl = g_kl * distance * inverse_p
            to_mu_q = to_mu_q + from_kl
            to_mu_p = to_mu_p - from_kl
            to_sigma_q += g_kl * (ratio * inverse_p - inverse_q)
            to_sigma_p += g_kl * (1.0 - distance * distance - ratio * ratio)
        if THROUGH_Z or THROUGH_PRIOR:
            to_mu_q = to_mu_q * d_mu_q
        to_sigma_q = to_sigma_q * d_ls_q
        if grad_posterior is not None:
            store(grad_posterior, packed_mu, packed_step, k, to_mu_q, mask, TILE)
            store(grad_posterior, packed_ls, packed_step, k, to_sigma_q, mask, TILE)
        if grad_prior is not None:
            if THROUGH_PRIOR:
                to_mu_p = to_mu_p * d_mu_p
                to_sigma_p = to_sigma_p * inverse_p * d_ls_p
            if RESIDUAL:
                to_mu_p += to_mu_q
                to_sigma_p += to_sigma_q
            store(grad_prior, packed_mu, packed_step, k, to_mu_p, mask, TILE)
            store(grad_prior, packed_ls, packed_step, k, to_sigma_p, mask, TILE)
        if grad_noise is not None:
            at_noise = offsets(b, c, at, map_batch, map_step, TILE)
            store(grad_noise, at_noise, map_step, k, into_eps, mask, TILE)


def residual_normal(
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
) -> tuple[torch.Tensor, ...]:
    """z, kl, log_q, log_p of the operator's arguments."""
    space = Map("residual_normal", posterior, packed=True)
    z = space.empty()
    if space.count == 0:
        return z, *no_sums(space, 3)
    inputs = [space.view(t) for t in (posterior, prior, noise)]
    launch = space.launch(*inputs, sums=True)
    sums = Sums(launch, 3)
    launch.run(
        forward_kernel,
        *(view.tensor for view in inputs), seed, z, *sums.targets,
        *launch.sizes, float(sigma_floor), *launch.strides(*inputs, space.dense()),
        RESIDUAL=residual, CLAMP=float(clamp or 0), SHARED_LOGS=shared_logs(clamp, sigma_floor),
    )  # fmt: skip
    return z, *sums.finish()


def residual_normal_backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
    need_posterior: bool,
    need_prior: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of posterior, prior and noise; an empty tensor for one that is not wanted."""
    space = Map("residual_normal", posterior, packed=True)
    grad_posterior = space.empty(2) if need_posterior else None
    grad_prior = space.empty(2, prior.dtype) if need_prior and prior is not None else None
    grad_noise = space.empty(1, noise.dtype) if need_noise and noise is not None else None
    wanted = (grad_posterior, grad_prior, grad_noise)
    if space.count and any(t is not None for t in wanted):
        maps = [space.view(t) for t in (posterior, prior, noise, grad_z)]
        sums = [
            View(t, *t.stride()) if t is not None else View(None, 0, 0)
            for t in (grad_kl, grad_log_q, grad_log_p)
        ]
        launch = space.launch(*maps, sums=False)
        launch.run(
            backward_kernel,
            maps[3].tensor, grad_kl, grad_log_q, grad_log_p, *(view.tensor for view in maps[:3]), seed, *wanted,
            *launch.sizes, float(sigma_floor), *launch.strides(*maps, space.dense(2), space.dense()),
            *(stride for view in sums for stride in view[1:]),
            RESIDUAL=residual, CLAMP=float(clamp or 0),
        )  # fmt: skip
    nothing = [posterior.dtype if t is None else t.dtype for t in (posterior, prior, noise)]
    return tuple(
        posterior.new_empty(0, dtype=dtype) if t is None else t
        for t, dtype in zip(wanted, nothing, strict=True)
    )
