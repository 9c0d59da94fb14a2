"""The squashed normal of :mod:`nvae_fast.distributions`."""

from __future__ import annotations

import math
from typing import Any

import torch

from nvae_fast.distributions.gaussian_pair import (
    Seed,
    absolute_normal,
    check_pair,
    same_dtype,
)
from nvae_fast.distributions.lazy import Lazy
from nvae_fast.ops import _checks
from nvae_fast.ops._layout import pack
from nvae_fast.ops._squash import LOG_SQRT_2PI, draw_like, soft_clamp
from nvae_fast.ops.normal_log_prob import normal_log_prob
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.residual_normal import ResidualNormal

CLAMP, SIGMA_FLOOR = 5.0, 0.01


class Normal(Lazy):
    """Independent normals with squashed parameters; with ``c(t) = 5 tanh(t / 5)``::

        mu = c(raw mu)        sigma = temp * (exp(c(raw log sigma)) + 0.01)

    Args:
        mu: raw mu (B, Z, H, W).
        log_sigma: raw log sigma, like ``mu``. Halves of one tensor (``mu, log_sigma = torch.chunk(x, 2, dim=1)``) are read in
            place, anything else is concatenated when a kernel first needs it.
        temp: temperature, >= 0, a factor on sigma.

    The attributes ``mu`` and ``sigma`` may be set: every method then computes from what was set, in plain PyTorch, and
    ``packed`` is refused. Modifying one of them in place counts as setting it, except inside torch.compile and in inference
    mode, where PyTorch does not count modifications.

    Raises:
        TypeError: ``mu`` or ``log_sigma`` is not a dense floating tensor, or their dtypes differ.
        ValueError: not four dimensions, shapes or devices that differ, a temperature that is negative or not finite.
        RuntimeError: on first use, if ``mu`` or ``log_sigma`` were modified in place since.
    """

    def __init__(self, mu: torch.Tensor, log_sigma: torch.Tensor, temp: float = 1.0) -> None:
        check_pair("Normal", ("mu", "log_sigma"), mu, log_sigma)
        _checks.temperature("Normal", temp, zero=True)
        self._keep(mu=mu, log_sigma=log_sigma)
        self.shape, self.temp = mu.shape, temp

    @classmethod
    def from_packed(cls, params: torch.Tensor, temp: float = 1.0) -> Normal:
        """The same from packed raw parameters (B, 2Z, H, W), first Z channels raw mu, last Z raw log sigma.

        Gradients go to ``params`` directly; those of two halves are put together again by autograd, a copy. A posterior that
        is relative to its prior is ``Normal.from_packed(raw_q + raw_p)``; :func:`nvae_fast.residual_normal` adds them too.

        Raises:
            TypeError, ValueError: as the constructor, and for an odd number of channels.
        """
        _checks.packed("Normal.from_packed", "params", params)
        _checks.temperature("Normal.from_packed", temp, zero=True)
        b, channels, h, w = params.shape
        normal = cls.__new__(cls)
        normal._keep(params=params)
        normal.shape, normal.temp = torch.Size((b, channels // 2, h, w)), temp
        return normal

    @property
    def packed(self) -> torch.Tensor:
        """The raw parameters as one tensor (B, 2Z, H, W): a view of what they are halves of, else a copy.

        Raises:
            RuntimeError: ``mu`` or ``sigma`` was set, so that the raw parameters are not this distribution's.
        """
        if not self._follows_raw:
            raise RuntimeError(
                "Normal.packed: mu or sigma was set, and the raw parameters do not describe this distribution any more; "
                "read mu and sigma, or make a Normal of other raw parameters"
            )
        self._check_unchanged()  # always: what is kept is a view
        return self._raw_parameters()

    def _raw_parameters(self) -> torch.Tensor:
        if "params" in self._raw:
            return self._raw["params"]
        return self._get("packed", lambda: pack(self._raw["mu"], self._raw["log_sigma"]))

    @property
    def mu(self) -> torch.Tensor:
        """Squashed mu (B, Z, H, W), float32 or float64, or what was set: such a tensor, one that expands to it, or a number."""
        return self._get("mu", lambda: soft_clamp(self._half("mu", 0), CLAMP))

    @mu.setter
    def mu(self, value: torch.Tensor | float) -> None:
        self._set("mu", value)

    @property
    def sigma(self) -> torch.Tensor:
        """Squashed sigma times the temperature (B, Z, H, W), float32 or float64, or what was set, as for ``mu``. The
        temperature does not apply to a sigma that was set."""
        return self._get("sigma", self._sigma)

    @sigma.setter
    def sigma(self, value: torch.Tensor | float) -> None:
        self._set("sigma", value)

    def __setattr__(self, name: str, value: Any) -> None:
        # Instead of the properties' setters, which type checkers need: torch.compile of PyTorch 2.11 does not call them.
        if name in ("mu", "sigma"):
            self._set(name, value)
        else:
            super().__setattr__(name, value)

    def _set(self, name: str, value: torch.Tensor | float) -> None:
        op, like = f"Normal.{name}", self._any
        dtype = _checks.accumulate_dtype(like.dtype)
        if isinstance(value, torch.Tensor):
            _checks.tensor(op, name, value)
            _checks.device(op, name, value, like)
            value = value.to(dtype)
            if value.shape != self.shape:
                try:
                    value = value.expand(self.shape).clone()  # a copy, which may be modified in place
                except RuntimeError:
                    shapes = f"must expand to {tuple(self.shape)}, got {tuple(value.shape)}"
                    raise ValueError(f"{op}: {name} {shapes}") from None
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{op}: {name} must be a tensor or a number, got {type(value).__name__}")
            if not math.isfinite(value) or (name == "sigma" and value < 0):
                bound = " >= 0" if name == "sigma" else ""
                raise ValueError(f"{op}: {name} must be a finite number{bound}, got {value}")
            value = torch.full(self.shape, value, dtype=dtype, device=like.device)
        self._given[name] = value

    @property
    def _follows_raw(self) -> bool:
        """Whether mu and sigma are those of the raw parameters, which the kernels read."""
        return self._changed("mu") is None and self._changed("sigma") is None

    def _sigma(self) -> torch.Tensor:
        sigma = torch.exp(soft_clamp(self._half("log_sigma", 1), CLAMP)) + SIGMA_FLOOR
        return sigma if self.temp == 1 else sigma * self.temp

    def _half(self, name: str, index: int) -> torch.Tensor:
        raw = self._raw[name] if name in self._raw else self._raw["params"].chunk(2, dim=1)[index]
        return raw.to(_checks.accumulate_dtype(raw.dtype))

    def sample(self, seed: Seed = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``z = mu + sigma * eps`` and the fresh ``eps`` it was made from, both (B, Z, H, W); two kernels.

        Args:
            seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator.

        Returns:
            z in the parameters' dtype, differentiable in them; eps in float32 or float64.

        Raises:
            TypeError, ValueError: ``seed`` is something else.
        """
        eps = self._draw(None, _checks.seed("Normal.sample", seed, self._device))
        return self.sample_given_eps(eps), eps

    def _draw(self, noise: torch.Tensor | None, seed: torch.Tensor | None) -> torch.Tensor:
        """Standard normal draws (B, Z, H, W) in the memory format of the parameters, float32 or float64."""
        return draw_like(self._raw_parameters(), noise, seed)

    def rsample(self, seed: Seed = None) -> torch.Tensor:
        """The z of :meth:`sample`, the same for the same ``seed``, without keeping eps; one kernel.

        Raises:
            TypeError, ValueError: ``seed`` is something else.
        """
        seed_tensor = _checks.seed("Normal.rsample", seed, self._device)
        if not self._follows_raw:
            return self.sample_given_eps(self._draw(None, seed_tensor))
        return normal_sample(self.packed, temperature=self.temp, seed=seed_tensor)

    def sample_given_eps(self, eps: torch.Tensor) -> torch.Tensor:
        """``z = mu + sigma * eps`` (B, Z, H, W) in the parameters' dtype; one kernel, differentiable in eps too.

        Raises:
            TypeError, ValueError: ``eps`` is not a floating (B, Z, H, W) tensor on the parameters' device.
        """
        self._check_map("sample_given_eps", "eps", eps)
        if not self._follows_raw:
            return (self.mu + self.sigma * eps).to(self._any.dtype)
        return normal_sample(self.packed, temperature=self.temp, noise=eps)

    def log_p(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-density of every element, (B, Z, H, W) in nats:
        ``-((samples - mu) / sigma)^2 / 2 - log(2 pi) / 2 - log sigma``.

        Raises:
            TypeError, ValueError: ``samples`` is not a floating (B, Z, H, W) tensor on the parameters' device.
        """
        self._check_map("log_p", "samples", samples)
        return -0.5 * ((samples - self.mu) / self.sigma).square() - LOG_SQRT_2PI - self.sigma.log()

    def kl(self, normal_dist: Normal) -> torch.Tensor:
        """KL(self || normal_dist) of every element, (B, Z, H, W) in nats:
        ``((mu - mu_o) / sigma_o)^2 / 2 + (sigma / sigma_o)^2 / 2 - 1/2 - log(sigma / sigma_o)``.

        Raises:
            TypeError, ValueError: ``normal_dist`` is not a :class:`Normal` of this shape and device.
        """
        self._check_other("kl", "normal_dist", normal_dist)
        distance = (self.mu - normal_dist.mu) / normal_dist.sigma
        ratio = self.sigma / normal_dist.sigma
        return 0.5 * (distance.square() + ratio.square()) - 0.5 - ratio.log()

    def kl_per_channel(self, prior: Normal | None = None) -> torch.Tensor:
        """:meth:`kl` summed over pixels, (B, Z), in one kernel (plain PyTorch where a temperature is not 1, or mu or sigma
        was set).

        Args:
            prior: None means raw zeros (mu 0, sigma 1.01), the prior of NVAE's first group.

        Raises:
            TypeError, ValueError: ``prior`` is not a :class:`Normal` of this shape and device.
        """
        self._check_other("kl_per_channel", "prior", prior)
        if not self._fits_kernel(prior):
            return self.kl(self._or_first(prior)).sum((2, 3))
        # The kernel samples as well; a fixed seed leaves the generators alone.
        return self._fused(prior, None, 0).kl

    def log_p_per_channel(self, samples: torch.Tensor) -> torch.Tensor:
        """:meth:`log_p` summed over pixels, (B, Z), in one kernel (plain PyTorch where the temperature is not 1, or mu or
        sigma was set).

        Raises:
            TypeError, ValueError: ``samples`` is not a floating (B, Z, H, W) tensor on the parameters' device.
        """
        self._check_map("log_p_per_channel", "samples", samples)
        if not self._fits_kernel(None):
            return self.log_p(samples).sum((2, 3))
        return normal_log_prob(*same_dtype(samples, self.packed))

    def sample_with_kl(
        self, prior: Normal | None = None, seed: Seed = None, noise: torch.Tensor | None = None
    ) -> ResidualNormal:
        """Sample and measure against a prior in one kernel (plain PyTorch where a temperature is not 1, or mu or sigma
        was set).

        Args:
            prior: None means raw zeros (mu 0, sigma 1.01), the prior of NVAE's first group.
            seed: as in :meth:`sample`, and the same z for the same seed.
            noise: standard normal draws (B, Z, H, W) in place of a seed.

        Returns:
            :class:`nvae_fast.ResidualNormal`: z (B, Z, H, W); of that z, kl, log_q under this distribution and log_p under the
            prior, (B, Z), summed over pixels.

        Raises:
            TypeError, ValueError: ``prior`` is not a :class:`Normal` of this shape and device, ``noise`` no such tensor, or
                both noise and seed are given.
        """
        self._check_other("sample_with_kl", "prior", prior)
        if noise is not None:
            if seed is not None:
                raise ValueError("Normal.sample_with_kl: give either noise or seed, not both")
            self._check_map("sample_with_kl", "noise", noise)
        else:
            seed = _checks.seed("Normal.sample_with_kl", seed, self._device)
        if self._fits_kernel(prior):
            return self._fused(prior, noise, seed)
        prior = self._or_first(prior)
        eps = self._draw(noise, None if noise is not None else torch.as_tensor(seed))
        z = self.mu + self.sigma * eps
        log_q = -0.5 * eps.square() - LOG_SQRT_2PI - self.sigma.log()
        sums = (t.sum((2, 3)) for t in (self.kl(prior), log_q, prior.log_p(z)))
        return ResidualNormal(z.to(self._any.dtype), *sums)

    def _fused(self, prior: Normal | None, noise: torch.Tensor | None, seed: Seed) -> ResidualNormal:
        packed, packed_prior = self.packed, None if prior is None else prior.packed
        return absolute_normal(packed, packed_prior, noise=noise, seed=seed)

    def _fits_kernel(self, prior: Normal | None) -> bool:
        return all(n is None or (n.temp == 1 and n._follows_raw) for n in (self, prior))

    def _or_first(self, prior: Normal | None) -> Normal:
        if prior is not None:
            return prior
        b, z, h, w = self.shape
        return Normal.from_packed(self._any.new_zeros(b, 2 * z, h, w))

    @property
    def _any(self) -> torch.Tensor:
        return next(iter(self._raw.values()))

    @property
    def _device(self) -> torch.device:
        return self._any.device

    def _check_map(self, method: str, name: str, value: Any) -> None:
        _checks.shape(f"Normal.{method}", name, value, tuple(self.shape), self._any)

    def _check_other(self, method: str, name: str, other: Any) -> None:
        if other is None and name == "prior":
            return
        if not isinstance(other, Normal):
            raise TypeError(f"Normal.{method}: {name} must be a Normal, got {type(other).__name__}")
        if other.shape != self.shape:
            raise ValueError(
                f"Normal.{method}: {name} must have shape {tuple(self.shape)}, got {tuple(other.shape)}"
            )
        _checks.device(f"Normal.{method}", name, other._any, self._any)
