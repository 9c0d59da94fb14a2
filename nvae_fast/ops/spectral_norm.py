"""Power iteration of many matrices at once, as two internal operators of the spectral regulariser. Not differentiable.

Weights of one matrix shape form a group; ``weights`` holds them group after group, ``u`` and ``v``
hold a group's vectors, (n, rows) and (n, columns).

::

    spectral_lengths     iterations times: v = W'u / max(||W'u||, eps),  u = W v / max(||W v||, eps);  lengths = ||W v|| of each
    spectral_gradients   grad u v' of each, shaped and laid out like its weight: the gradient of u'W v
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.ops._op import define_kernel

Tensors = list[Tensor]


def _groups(weights: Tensors, u: Tensors) -> list[Tensors]:
    counts = [vectors.shape[0] for vectors in u]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [weights[start : start + count] for start, count in zip(starts, counts, strict=True)]


def _stacked(weights: Tensors, rows: int) -> Tensor:
    """Weights of one matrix shape as (n, rows, columns)."""
    if any(w.shape != weights[0].shape for w in weights):
        weights = [w.reshape(rows, -1) for w in weights]
    return torch.stack(weights).reshape(len(weights), rows, -1)


def _normalized(vectors: Tensors, eps: float) -> tuple[Tensors, Tensors]:
    """``vectors`` (n, 1, length) over their norms, in place, and the norms (n, 1, 1)."""
    lengths = [torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in vectors]
    torch._foreach_div_(vectors, torch._foreach_clamp_min(lengths, eps))
    return vectors, lengths


def _lengths(weights: Tensors, u: Tensors, iterations: int, eps: float) -> tuple[Tensor, Tensors, Tensors]:
    matrices = [_stacked(group, x.shape[1]) for group, x in zip(_groups(weights, u), u, strict=True)]
    transposed = [w.mT for w in matrices]
    left = [x.unsqueeze(1).clone() for x in u]
    for _ in range(iterations):
        right, _norms = _normalized([torch.bmm(x, w) for x, w in zip(left, matrices, strict=True)], eps)
        left, found = _normalized([torch.bmm(x, w) for x, w in zip(right, transposed, strict=True)], eps)
    return torch.cat(found).flatten(), [x.squeeze(1) for x in left], [x.squeeze(1) for x in right]


def _lengths_fake(
    weights: Tensors, u: Tensors, iterations: int, eps: float
) -> tuple[Tensor, Tensors, Tensors]:
    groups = _groups(weights, u)
    v = [x.new_empty(x.shape[0], g[0].numel() // x.shape[1]) for g, x in zip(groups, u, strict=True)]
    return weights[0].new_empty(len(weights)), [torch.empty_like(x) for x in u], v


def _gradients(grad: Tensor, weights: Tensors, u: Tensors, v: Tensors) -> Tensors:
    found: Tensors = []
    for group, x, y in zip(_groups(weights, u), u, v, strict=True):
        products = torch.bmm((grad * x).unsqueeze(2), y.unsqueeze(1)).unbind()
        found += [product.reshape(w.shape).clone() for product, w in zip(products, group, strict=True)]
    return found


lengths = define_kernel("spectral_lengths", _lengths, fake=_lengths_fake)
gradients = define_kernel(
    "spectral_gradients", _gradients, fake=lambda grad, weights, u, v: [torch.empty_like(w) for w in weights]
)
