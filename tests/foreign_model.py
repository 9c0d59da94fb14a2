"""A miniature of our own writing in the style of NVAE code found elsewhere: the same class names and attributes, other code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SyncBatchNormSwish(nn.BatchNorm2d):
    """Rebinds its counter instead of adding to it in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return y * torch.sigmoid(y)


class SyncBatchNorm(nn.Module):
    """A wrapper that sets an attribute of its batch norm in every call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.SyncBatchNorm(channels, momentum=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn.ddp_gpu_size = 1
        return self.bn(x)


def local(model: nn.Module) -> nn.Module:
    """``model`` with batch norms of one process in the wrappers: PyTorch's synchronised ones need a GPU for several."""
    for part in model.modules():
        if isinstance(part, SyncBatchNorm):
            norm = nn.BatchNorm2d(part.bn.num_features, momentum=part.bn.momentum)
            norm.load_state_dict(part.bn.state_dict())
            part.bn = norm.to(part.bn.weight.dtype)
    return model


class Conv2D(nn.Conv2d):
    def __init__(
        self, c_in, c_out, kernel, stride=1, padding=0, dilation=1, groups=1, bias=False, weight_norm=True
    ):
        super().__init__(c_in, c_out, kernel, stride, padding, dilation, groups, bias)
        self.log_weight_norm = None
        if weight_norm:
            self.log_weight_norm = nn.Parameter(torch.log(norm_of(self.weight) + 0.01))
        self.data_init, self.init_done = False, False
        self.weight_normalized = self.normalize_weight()

    def normalize_weight(self) -> torch.Tensor:
        if self.log_weight_norm is None:
            return self.weight
        return torch.exp(self.log_weight_norm) * (self.weight / (norm_of(self.weight) + 1e-5))

    def initialize(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.bias -= x.mean()
        self.init_done = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.data_init and self.training and not self.init_done:
            self.initialize(x)
        self.weight_normalized = self.normalize_weight()
        return F.conv2d(
            x, self.weight_normalized, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class MaskedConv2d(Conv2D):
    def __init__(self, c_in, c_out, kernel, groups=1):
        nn.Conv2d.__init__(self, c_in, c_out, kernel, padding=kernel // 2, groups=groups)
        mask = torch.ones(self.weight.shape)
        mask[:, :, kernel // 2, kernel // 2 :] = 0
        mask[:, :, kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)
        self.log_weight_norm = nn.Parameter(torch.log(norm_of(self.weight * mask) + 0.01))
        self.data_init = False

    def normalize_weight(self) -> torch.Tensor:
        masked = self.weight * self.mask
        return torch.exp(self.log_weight_norm) * (masked / (norm_of(masked) + 1e-5))


def norm_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)


class SE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.se(torch.mean(x, dim=[2, 3]))
        return x * gate.view(gate.size(0), gate.size(1), 1, 1)


class ConvBNSwish(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        conv = Conv2D(c_in, c_out, kernel, stride, kernel // 2, groups=groups, weight_norm=False)
        self.conv = nn.Sequential(conv, SyncBatchNormSwish(c_out, eps=1e-5, momentum=0.05))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int = 3) -> None:
        super().__init__()
        hidden = expansion * c_in
        self.conv = nn.Sequential(
            *([nn.UpsamplingNearest2d(scale_factor=2)] if stride == -1 else []),
            SyncBatchNorm(c_in),
            ConvBNSwish(c_in, hidden, 1),
            ConvBNSwish(hidden, hidden, 5, abs(stride), groups=hidden),
            Conv2D(hidden, c_out, 1, weight_norm=False),
            SyncBatchNorm(c_out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class BNSwishConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.bn_act = SyncBatchNormSwish(c_in, eps=1e-5, momentum=0.05)
        self.conv_0 = Conv2D(c_in, c_out, 3, stride, dilation, dilation, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_0(self.bn_act(x))


class FactorizedReduce(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv_1 = Conv2D(c_in, c_out // 2, 1, stride=2, bias=True)
        self.conv_2 = Conv2D(c_in, c_out - c_out // 2, 1, stride=2, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(x)
        return torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)


class UpSkip(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Conv2D(c_in, c_out, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class Cell(nn.Module):
    def __init__(self, ops, skip, channels: int, use_se: bool) -> None:
        super().__init__()
        self.skip, self._ops, self._num_nodes, self.use_se = skip, nn.ModuleList(ops), len(ops), use_se
        if use_se:
            self.se = SE(channels)

    def forward(self, s: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        x = s
        for i in range(self._num_nodes):
            x = self._ops[i](x)
        x = x if temb is None else x + temb
        x = self.se(x) if self.use_se else x
        return self.skip(s) + 0.1 * x


class Tower(nn.Module):
    """Encoder, flow and a mobile-net-like decoder."""

    def __init__(self, channels: int = 20) -> None:
        super().__init__()
        c = channels
        self.stem = Conv2D(3, c, 3, padding=1, bias=True)
        self.enc = nn.ModuleList([
            Cell([BNSwishConv(c, c, 1), BNSwishConv(c, c, 1, dilation=2)], nn.Identity(), c, use_se=True),
            Cell([InvertedResidual(c, 2 * c, 2)], FactorizedReduce(c, 2 * c), 2 * c, use_se=True),
            Cell([InvertedResidual(2 * c, 2 * c, 1)], nn.Identity(), 2 * c, use_se=False),
        ])  # fmt: skip
        self.flow = nn.Sequential(
            MaskedConv2d(2 * c, 2 * c, 3), nn.ELU(), MaskedConv2d(2 * c, 2 * c, 5, groups=2 * c)
        )
        self.dec = nn.Sequential(
            nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c), nn.SiLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c), nn.SiLU(inplace=True),
            nn.Conv2d(c, 3, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(2 * x - 1)
        for cell in self.enc:
            x = cell(x)
        return self.dec(x - self.flow(x))
