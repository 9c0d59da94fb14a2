"""The two regularisers of NVAE (arXiv 2007.03898, section 3.2; specification section 2).

Spectral: the sum over all convolutions of the largest singular value of the normalised weight, reshaped to
``(C_out, -1)``; estimated by power iteration, batched over the layers of one shape. Batch norm: the sum over layers of
``max |gamma|``. Neither works layer by layer: layers of one shape are stacked, and the groups normalise together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvae_fast.nn import BatchNormSwish, PlainConv2d, WeightNormConv2d
from nvae_fast.ops import _checks

ITERATIONS = 4
FIRST_ITERATIONS = 40
NORMALIZE_EPS = 1e-3


def convolutions(model: nn.Module) -> dict[str, WeightNormConv2d | PlainConv2d]:
    """Every convolution of ``model`` by name, in registration order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (WeightNormConv2d, PlainConv2d))}


class SpectralEstimate(nn.Module):
    """Power iteration with persistent vectors ``u`` and ``v``, one pair of buffers per weight shape.

    The estimate lies below the exact value by up to 1e-3 (relative) after the first 40 iterations; gradients flow through
    ``u^T W v`` only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shapes: dict[tuple[int, int], list[str]] = {}
        for name, conv in convolutions(model).items():
            rows = conv.weight.shape[0]
            shapes.setdefault((rows, conv.weight.numel() // rows), []).append(name)
        self.layers = shapes
        self.warm = False
        for (rows, columns), names in shapes.items():
            self.register_buffer(
                f"u_{rows}x{columns}", F.normalize(torch.randn(len(names), rows), dim=1, eps=NORMALIZE_EPS)
            )
            self.register_buffer(
                f"v_{rows}x{columns}", F.normalize(torch.randn(len(names), columns), dim=1, eps=NORMALIZE_EPS)
            )

    def get_extra_state(self) -> dict[str, bool]:
        return {"warm": self.warm}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.warm = state["warm"]

    def forward(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the estimated largest singular values of ``weights`` (normalised, by layer name)."""
        matrices, rows, columns = [], [], []
        for (height, width), names in self.layers.items():
            w = _stacked([weights[name] for name in names], height, width)
            matrices.append(w.to(_checks.accumulate_dtype(w.dtype)))
            rows.append(self.get_buffer(f"u_{height}x{width}").unsqueeze(1))
            columns.append(self.get_buffer(f"v_{height}x{width}").unsqueeze(1))
        with torch.no_grad():
            u = [vectors.to(w.dtype) for vectors, w in zip(rows, matrices, strict=True)]
            transposed = [w.mT for w in matrices]
            for _ in range(ITERATIONS if self.warm else FIRST_ITERATIONS):
                v, _ = _normalized([torch.bmm(x, w) for x, w in zip(u, matrices, strict=True)])
                u, lengths = _normalized([torch.bmm(x, w) for x, w in zip(v, transposed, strict=True)])
            torch._foreach_copy_(rows + columns, u + v)
        self.warm = True
        return _Values.apply(torch.cat(lengths), u, v, *matrices)


def _stacked(weights: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Weights of one matrix shape as (n, height, width)."""
    if any(w.shape != weights[0].shape for w in weights):
        weights = [w.reshape(height, width) for w in weights]
    return torch.stack(weights).reshape(len(weights), height, width)


def _normalized(vectors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``vectors`` (n, 1, length) over their norms, in place, and the norms (n, 1, 1)."""
    lengths = [torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in vectors]
    torch._foreach_div_(vectors, torch._foreach_clamp_min(lengths, NORMALIZE_EPS))
    return vectors, lengths


class _Values(torch.autograd.Function):
    """The sum of ``u^T W v``, of which ``||W v||`` is known: ``u = W v / max(||W v||, eps)``. Its gradient is ``u v^T``."""

    @staticmethod
    def forward(
        ctx: Any, lengths: torch.Tensor, u: list[torch.Tensor], v: list[torch.Tensor], *matrices: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*u, *v)
        return (lengths.square() / lengths.clamp_min(NORMALIZE_EPS)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        vectors, count = ctx.saved_tensors, len(ctx.saved_tensors) // 2
        scaled = torch._foreach_mul(vectors[:count], grad)
        gradients = [torch.bmm(u.mT, v) for u, v in zip(scaled, vectors[count:], strict=True)]
        return None, None, None, *gradients


def batch_norm_regularizer(model: nn.Module) -> torch.Tensor:
    """Sum over batch norm layers of ``max |gamma|``; zero for a model without any."""
    widths: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, BatchNormSwish):
            widths.setdefault(module.weight.numel(), []).append(module.weight)
    if widths:
        return torch.cat([torch.stack(group).abs().amax(1) for group in widths.values()]).sum()
    parameter: Any = next(model.parameters())
    return parameter.new_zeros(())
