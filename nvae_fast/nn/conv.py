"""The convolutions of :mod:`nvae_fast.nn`: with weight norm, and the plain ones of the inverted residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvae_fast import distributed
from nvae_fast.nn.plain import full
from nvae_fast.nn.shared_weights import WeightNormed, prepared_layer
from nvae_fast.nn.state import check_state
from nvae_fast.ops import _checks, wide_conv2d, winograd
from nvae_fast.ops.weight_norm import weight_norm


def odd_kernel(name: str, kernel_size: Any) -> int:
    """``kernel_size`` as an odd int: only then is "same" padding the same on both sides."""
    size = positive(name, "kernel_size", kernel_size, "an odd int")
    if size % 2 == 0:
        raise ValueError(f"{name}: kernel_size must be an odd int >= 1, got {size}")
    return size


def positive(name: str, argument: str, value: Any, kind: str = "an int") -> int:
    """``value`` as an int >= 1, NumPy's included; ``kind`` is what the error asks for."""
    try:
        size = _checks.whole(name, argument, value)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"{name}: {argument} must be {kind} >= 1, got {value!r}")
    return size


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Any) -> torch.Tensor:
    """Return the convolution with the stride, padding, dilation and groups of ``conv``, by the faster arithmetic."""
    geometry = wide_conv2d.geometry_of(conv)
    if wide_conv2d.convolves(x, weight):
        return wide_conv2d.conv2d(x, weight, bias, *geometry)
    if winograd.computes(x, weight, geometry):
        return winograd.conv2d(x, weight, bias)
    return F.conv2d(x, weight, bias, *geometry)


class WeightNormConv2d(WeightNormed):
    """Convolution with ``w = exp(log_weight_norm) * weight / (||weight|| + 1e-5)``, "same" padding, square kernel.

    (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride)), in the dtype of the input. NVAE (arXiv 2007.03898),
    section 3.1.1; Salimans and Kingma, arXiv 1602.07868.

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size: K, odd.
        stride, dilation, groups: as those of torch.nn.Conv2d.
        bias: whether a bias is added.
        mask: zeros and ones, shaped like the weight (C_out, C_in / groups, K, K), make it a masked convolution; the norm
            is that of the masked weight. It is not in the state dict. In a module made on the meta device it gets its
            values when the module gets storage, which needs a mask made elsewhere.
        data_init: set ``bias`` and ``log_weight_norm`` from the first training batch so that the output has mean 0 and
            standard deviation 0.2; loading any state marks this as done.

    Raises:
        TypeError, ValueError: a kernel size that is no odd int (ValueError); on the call, x is no floating (B, C_in, H, W).
    """

    _mask_values: torch.Tensor | None = None  # of a mask on the meta device

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        mask: torch.Tensor | None = None,
        data_init: bool = False,
    ) -> None:
        super().__init__()
        kernel_size = odd_kernel("WeightNormConv2d", kernel_size)
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, groups=groups, bias=bias
        )  # PyTorch's default initialisation
        self.weight = plain.weight
        self.bias: nn.Parameter | None = plain.bias  # type: ignore[assignment]
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = kernel_size // 2 * dilation
        self.mask: torch.Tensor | None
        self.register_buffer("mask", None if mask is None else mask.to(plain.weight), persistent=False)
        if mask is not None and plain.weight.is_meta and not mask.is_meta:
            self._mask_values = mask
        masked = plain.weight if self.mask is None else plain.weight * self.mask
        norm = torch.linalg.vector_norm(masked.detach(), dim=(1, 2, 3), keepdim=True)
        self.log_weight_norm = nn.Parameter(torch.log(norm + 0.01))
        self.needs_data_init = data_init
        self.process_group: Any = None

    def normalized_weight(self) -> torch.Tensor:
        """Return the normalised weight (C_out, C_in / groups, K, K).

        Inside ``prepare_weights`` it is the shared one, under autocast in the dtype that products are computed in; else it is
        computed.
        """
        layer = prepared_layer(self)
        return self.own_weight() if layer is None else layer.normalized

    def own_weight(self) -> torch.Tensor:
        """Compute the normalised weight."""
        return weight_norm(full(self.weight), full(self.log_weight_norm), self.mask)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.mask
        super()._apply(fn, *args, **kwargs)
        if before is not None and self.mask is not None and self.mask is not before:
            if not before.is_meta:
                self._mask_values = before if self.mask.is_meta else None
            self._fill_mask(self.mask, before if self._mask_values is None else self._mask_values)
        return self

    def _fill_mask(self, mask: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``values`` to ``mask``, which ``to_empty`` leaves uninitialised and no state dict holds."""
        if mask.is_meta:
            return
        if values.is_meta:
            raise RuntimeError(
                "WeightNormConv2d: its mask was made on the meta device and has no values; make it on another device"
            )
        mask.copy_(values)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)
        self.needs_data_init = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.mask is not None and self.mask.is_meta and not self.weight.is_meta:  # assign=True
            values, self.mask = self.mask, torch.empty_like(self.mask, device=self.weight.device)
            self._fill_mask(self.mask, values if self._mask_values is None else self._mask_values)

    @torch.no_grad()
    def _initialize_from(self, x: torch.Tensor) -> None:
        weight = weight_norm(self.weight, torch.zeros_like(self.log_weight_norm), self.mask)
        y = self._convolve(x, weight, None).to(self.weight.dtype)
        has_spread = y.numel() // max(y.shape[1], 1) > 1
        if has_spread:
            std, mean = torch.std_mean(y, (0, 2, 3))
        elif distributed.world_size(self.process_group) == 1:
            return  # the next batch initialises
        else:  # every process takes part, and the average is over those that have a spread
            std = mean = y.new_zeros(y.shape[1])
        share = mean.new_full((1,), float(has_spread))
        mean, std, share = distributed.average((mean, std, share), self.process_group)
        mean, spread = mean / share, 5.0 * std / share + 1e-5
        if self.bias is not None:
            self.bias.copy_(-mean / spread)
        self.log_weight_norm.copy_(-torch.log(spread)[:, None, None, None])
        self.needs_data_init = False

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolution(x, weight, bias, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _checks.channels("WeightNormConv2d", "x", x, self.weight.shape[1] * self.groups)
        if self.needs_data_init and self.training:
            self._initialize_from(x)
        return self._convolve(x, self.normalized_weight(), self.bias)

    def extra_repr(self) -> str:
        c_out, c_in, k, _ = self.weight.shape
        return f"{c_in * self.groups}, {c_out}, {k}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"


class PlainConv2d(nn.Conv2d):
    """Convolution ``y = weight * x`` without weight norm and bias, "same" padding: those inside the inverted residual.

    (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels, out_channels: C_in, C_out.
        kernel_size: K, odd.
        stride, groups: as those of torch.nn.Conv2d.

    Raises:
        ValueError: a kernel size that is no odd int.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        kernel_size = odd_kernel("PlainConv2d", kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _checks.tensor("PlainConv2d", "weight", self.weight)
        return super().forward(x)

    def normalized_weight(self) -> torch.Tensor:
        """Return the weight (C_out, C_in / groups, K, K) as it is; for the spectral regulariser."""
        return full(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
