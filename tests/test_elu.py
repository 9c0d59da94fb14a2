"""elu: fp64 truth, small and extreme values, and everything an op must do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    assert_accurate,
    assert_close,
    assert_compiles,
    assert_empty_works,
    assert_gradcheck,
    assert_indifferent_to_layout,
    assert_no_double_backward,
    assert_opcheck,
    assert_repeatable,
    place,
)

import nvae_fast as nf
from nvae_fast.ops.elu import elu

# One pixel, one channel, lengths with and without tails, longer than a task.
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (1, 1, 1, 1), (2, 32, 8, 8), (3, 20, 40, 57)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 5, 7)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {"x": 2 * torch.randn(size, generator=generator, dtype=torch.float64)}


def formula(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.expm1(x.clamp_max(0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    for size in SIZES:
        tensors = place(inputs(size), dtype, memory_format, device)
        assert_accurate(elu, formula, tensors, ["x"])
        out = elu(**tensors)
        assert (out.dtype, out.stride()) == (dtype, torch.empty_like(tensors["x"]).stride()) or 1 in size


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


def test_gradcheck(route: str) -> None:
    assert_gradcheck(elu, inputs((2, 3, 2, 2)), ["x"])


def test_opcheck(device: torch.device) -> None:
    x = place(inputs((2, 3, 2, 2)), torch.float32, torch.channels_last, device)["x"]
    assert_opcheck("elu", x, differentiable=[0])
    assert_opcheck("elu_backward", torch.ones_like(x), x)


def test_compiles(device: torch.device) -> None:
    tensors = place(inputs((2, 3, 2, 2)), torch.float32, torch.contiguous_format, device)
    assert_compiles(elu, tensors, ["x"])


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs(), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(elu, tensors, ["x"])
    assert_repeatable(elu, tensors, ["x"])
    assert assert_empty_works(elu, {"x": tensors["x"][:0]}, ["x"])["output 0"].shape == (0, 6, 5, 7)


def test_no_double_backward() -> None:
    leaf = inputs()["x"].requires_grad_()
    assert_no_double_backward("elu", torch.ops.nvae_fast.elu(leaf), leaf)


def test_errors(route: str) -> None:
    with pytest.raises(TypeError, match=r"^elu: x must be a torch.Tensor, got float"):
        elu(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^elu: x must have shape \(B, C, H, W\), got \(3, 4, 4\)"):
        elu(torch.zeros(3, 4, 4))


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
