"""normal_sample: temperature, clamps, and the statistics of its draws."""

from __future__ import annotations

import pytest
import torch
from descriptions.normal_sample import formula, inputs, op
from harness import (
    assert_close,
)

import nvae_fast as nf


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 1.3])
def test_temperature_multiplies_sigma(temperature: float, route: str) -> None:
    tensors = inputs()
    assert_close(op(**tensors, temperature=temperature), formula(**tensors, temperature=temperature), 1e-13)


def test_without_clamp_and_floor(route: str) -> None:
    tensors = inputs()
    mu, log_sigma = tensors["params"].chunk(2, dim=1)
    z = op(**tensors, temperature=1.0, clamp=None, sigma_floor=0)
    assert_close(z, mu + log_sigma.exp() * tensors["noise"], 1e-13)


def test_statistics_of_the_draws(route: str, device: torch.device) -> None:
    """Mean and standard deviation over many draws, within four standard errors."""
    n = 40_000
    params = inputs((1, 4, 1, 1))["params"].to(device)
    z = nf.normal_sample(params.expand(n, -1, -1, -1), temperature=0.7, seed=3)[..., 0, 0].double()
    raw_mu, raw_log_sigma = params[0, :, 0, 0].chunk(2)
    mu, sigma = 5 * torch.tanh(raw_mu / 5), 0.7 * (torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + 0.01)
    assert ((z.mean(0) - mu).abs() <= 4 * sigma / n**0.5).all()
    assert ((z.std(0) - sigma).abs() <= 4 * sigma / (2 * n) ** 0.5).all()
