"""The call of the inverted residual cell as one operator, for our cells and for accelerated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.nn.batch_norm import update_running
from nvae_fast.ops.inverted_residual.eval import inverted_residual_cell_evaluation
from nvae_fast.ops.inverted_residual.train import CellParameters, inverted_residual_cell

RESIDUAL_SCALE = 0.1


def fused_cell(
    x: torch.Tensor,
    skip: torch.Tensor,
    parameters: CellParameters,
    norms: Sequence[Any],
    *,
    stride: int,
    group: Any,
    early: int = 0,
    counted: Sequence[bool] | None = None,
    residual_scale: float = RESIDUAL_SCALE,
) -> torch.Tensor:
    """``skip + residual_scale * [se](s)`` in the mode of ``norms``, whose running statistics are used or updated.

    Args:
        x: (B, C_in, H, W); skip: (B, C_out, H', W').
        parameters: of convolutions, batch norms and gate.
        norms: the four batch norms in order, in one mode and with one eps.
        stride: 1, 2 or -1 (upsample by 2).
        group: process group over which statistics are merged.
        early: how many of the batch norms see the map before it is upsampled.
        counted: for each batch norm, whether its batches are counted; None for all.
        residual_scale: factor of the branch.
    """
    eps = norms[0].eps
    if not norms[0].training:
        running = [(norm.running_mean, norm.running_var) for norm in norms]
        return inverted_residual_cell_evaluation(
            x, skip, parameters, running, stride=stride, eps=eps, residual_scale=residual_scale
        )
    y, seen = inverted_residual_cell(
        x, skip, parameters, stride=stride, eps=eps, residual_scale=residual_scale, group=group
    )
    if early and stride == -1:  # the variance is unbiased by the number of pixels that each batch norm sees
        seen = tuple(s._replace(count=s.count / 4) if i < early else s for i, s in enumerate(seen))  # type: ignore[arg-type]
    update_running(norms, seen, counted)
    return y
