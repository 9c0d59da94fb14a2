"""elu: small and extreme values, views, and its use in the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from descriptions.elu import formula, inputs
from harness import (
    assert_close,
)

import nvae_fast as nf
from nvae_fast.ops.elu import elu


def test_float64(route: str, memory_format: torch.memory_format) -> None:
    x = inputs((2, 5, 6, 7))["x"].contiguous(memory_format=memory_format).requires_grad_()
    assert_close(elu(x), formula(x), 1e-15)
    (slope,) = torch.autograd.grad(elu(x).sum(), x)
    assert_close(slope, torch.where(x > 0, torch.ones_like(x), x.exp()), 1e-15)


def test_small_and_extreme_values(route: str) -> None:
    """Without cancellation near 0, in value and far from it in the slope; infinities and NaN as PyTorch's."""
    x = torch.tensor([-1e-7, -1e-30, -1e-3, 0.0, 1e-30, -20.0, -90.0, -1e30, 1e30])
    x = torch.cat([x, torch.tensor([float("inf"), float("-inf"), float("nan")])]).view(1, 1, 3, 4)
    x.requires_grad_()
    y = elu(x)
    expected = formula(x.detach().double())
    assert torch.equal(y.isnan(), x.isnan())
    finite = ~x.isnan() & ~x.isinf()
    assert ((y - expected)[finite].abs() <= 1.2e-7 * expected[finite].abs()).all()
    assert y[0, 0, 2, 1:3].tolist() == [float("inf"), -1.0]
    y.sum().backward()
    wanted = torch.where(x > 0, 1.0, x.detach().exp())
    assert ((x.grad - wanted)[finite].abs() <= 1e-6 * wanted[finite] + 1e-34).all()


def test_views_and_mixed_layouts(route: str) -> None:
    base = inputs((2, 12, 6, 10))["x"].float()
    for x in (base[:, ::2], base[..., 1:7], base.transpose(2, 3), base[:1].expand(3, -1, -1, -1)):
        leaf = x.detach().requires_grad_()
        grad = torch.randn(x.shape).contiguous(memory_format=torch.channels_last)
        y = elu(leaf)
        assert_close(y, formula(x), 2e-7)
        assert_close(torch.autograd.grad(y, leaf, grad)[0], grad * torch.where(x > 0, 1.0, x.exp()), 3e-7)


def test_the_model_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ELU of PyTorch's is left in a model's forward pass where the kernel is."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("F.elu was called")

    config = nf.NVAEConfig.preset("mnist").replace(
        num_latent_scales=1,
        num_groups_per_scale=2,
        num_channels_enc=4,
        num_channels_dec=4,
        num_nf=1,
        ada_groups=False,
    )
    model = nf.NVAE(config)
    monkeypatch.setattr(F, "elu", forbidden)
    model(torch.rand(2, config.channels, config.resolution, config.resolution))
