"""The two regularisers of NVAE (arXiv 2007.03898, section 3.2; specification section 2).

Spectral: the sum over all convolutions of the largest singular value of the normalised weight, reshaped to
``(C_out, -1)``; estimated by power iteration, batched over the layers of one shape. Batch norm: the sum over layers of
``max |gamma|``. Neither is called layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvae_fast.models.frozen import MAKERS
from nvae_fast.nn import BatchNormSwish, PlainConv2d, WeightNormConv2d
from nvae_fast.nn.plain import full
from nvae_fast.ops import _checks, spectral_norm

ITERATIONS = 4
FIRST_ITERATIONS = 40
NORMALIZE_EPS = 1e-3


def convolutions(model: nn.Module) -> dict[str, WeightNormConv2d | PlainConv2d]:
    """Every convolution of ``model`` by name, in registration order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (WeightNormConv2d, PlainConv2d))}


class SpectralEstimate(nn.Module):
    """Power iteration with persistent vectors ``u`` and ``v``, one pair of buffers per weight shape.

    ``v`` is zero until the first estimate, which takes more iterations: a state dict needs no flag for it. The estimate is
    below the exact value by up to 1e-3 (relative) after the first 40 iterations; gradients flow through ``u^T W v`` only.
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
            self.register_buffer(f"v_{rows}x{columns}", torch.zeros(len(names), columns))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Files of version 0.1.0 have a flag, and a random v before the first estimate.
        flag = state_dict.pop(f"{prefix}_extra_state", None)
        found = {
            key: value
            for key, value in state_dict.items()
            if key.startswith(f"{prefix}v_") and isinstance(value, torch.Tensor)
        }
        if flag is not None and not (isinstance(flag, dict) and flag.get("warm")):
            found = {key: torch.zeros_like(value) for key, value in found.items()}
            state_dict.update(found)
        if found:
            self.warm = any(not v.is_meta and bool(v.any()) for v in found.values())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the estimated largest singular values of ``weights`` (normalised, by layer name)."""
        ordered, rows, columns = [], [], []
        for (height, width), names in self.layers.items():
            ordered += [weights[name] for name in names]
            rows.append(self.get_buffer(f"u_{height}x{width}"))
            columns.append(self.get_buffer(f"v_{height}x{width}"))
        wide = _checks.accumulate_dtype(ordered[0].dtype)
        value, *vectors = _Values.apply(
            ITERATIONS if self.warm else FIRST_ITERATIONS,
            [u.to(wide) for u in rows],
            *(w.to(wide) for w in ordered),
        )
        with torch.no_grad():
            torch._foreach_copy_(rows + columns, vectors)
        self.warm = True
        return value


class _Values(torch.autograd.Function):
    """The sum of ``u^T W v``, of which ``||W v||`` is known: ``u = W v / max(||W v||, eps)``. Its gradient is ``u v^T``."""

    @staticmethod
    def forward(ctx: Any, iterations: int, start: list[torch.Tensor], *weights: torch.Tensor) -> Any:
        lengths, u, v = spectral_norm.lengths(list(weights), start, iterations, NORMALIZE_EPS)
        ctx.save_for_backward(*weights, *u, *v)
        ctx.groups = len(u)
        ctx.mark_non_differentiable(*u, *v)
        return (lengths.square() / lengths.clamp_min(NORMALIZE_EPS)).sum(), *u, *v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *unused: Any) -> Any:
        saved, groups = list(ctx.saved_tensors), ctx.groups
        weights, u, v = saved[: -2 * groups], saved[-2 * groups : -groups], saved[-groups:]
        return None, None, *spectral_norm.gradients(grad, weights, u, v)


# A frozen model has no regularisers.
MAKERS[SpectralEstimate] = lambda spectral, done: nn.Identity().eval()


def batch_norm_regularizer(model: nn.Module) -> torch.Tensor:
    """Sum over batch norm layers of ``max |gamma|``; zero for a model without any."""
    widths: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, BatchNormSwish):
            widths.setdefault(module.weight.numel(), []).append(full(module.weight))
    if widths:
        return torch.cat([torch.stack(group).abs().amax(1) for group in widths.values()]).sum()
    parameter: Any = next(model.parameters())
    return parameter.new_zeros(())
