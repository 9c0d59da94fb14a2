"""The whole inverted residual cell in training, on the 4E + 6 schedule.

NVAE (arXiv 2007.03898), section 3.1.1 and appendix A. With BN the batch norm of batch statistics (biased variance, eps)::

    h = W1 BN0(x)                          1x1, C_in -> E C_in            (nearest x2 upsampling first when stride is -1)
    d = depthwise(swish(BN1(h)))           KxK, stride 1 or 2
    p = W3 swish(BN2(d))                   1x1, E C_in -> C_out
    y = skip + residual_scale * gate * BN3(p),   gate = sigmoid(We relu(Wr mean_hw(BN3(p)) + br) + be), or 1

Traffic in units of x, E the expansion: eager 14 E + 14 forward, here 4 E + 6, and backward keeps four maps (normalised
input, expansion, depthwise and projection output) where eager keeps about 6 E + 4. What makes it so, each exact:

- BN0 is affine and BN1 follows the 1x1 convolution, so with xhat = (x - mean0) / std0 the expansion is a = (W1 gamma0) xhat: it
  has mean 0, beta0 only moves the running mean of BN1 (its gradient is 0), and its variance is the diagonal of
  W (xhat' xhat / n) W': a Gram matrix costs 1 / E of the convolution.
- BN and swish are applied where the depthwise kernel loads, and its output's statistics are taken where it stores.
- BN3, gate, scale and skip are one affine map a plane: y = skip + A[b,c] p + B[b,c]; its reductions are sums over planes.
- 1x1 convolutions and BN commute with nearest upsampling: the expansion runs at low resolution, the depthwise kernel indexes by
  half. Statistics are equal but for the running variance's n / (n - 1), which counts upsampled pixels.
- Backward, BN1 is linear in (du, a): da = scale du + beta a + const, hence da W = du (scale W) + xhat (W' beta W) + const and
  da' xhat = scale du' xhat + beta W Gram: no pass over the expanded map. BN0's reduction is rowdot(W, dW). For small maps of
  many channels a pass over it costs less than the products with the Gram matrix, and is used instead (``_gram_pays``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvae_fast import distributed
from nvae_fast.ops import _backend, _checks, affine_activation, depthwise_conv2d, wide_conv2d
from nvae_fast.ops._op import compose, refuse_double_backward
from nvae_fast.ops.inverted_residual.coefficients import (
    coefficients,
    corrections,
    gate_backward,
    gate_coefficients,
    merge_planes,
    merged_coefficients,
    merged_corrections,
)
from nvae_fast.ops.inverted_residual.conv1x1 import as_matrix, conv1x1, weight_gradient

NAME = "inverted_residual_cell"
_OPS = torch.ops.nvae_fast  # called with arguments that need no checks
_SINGLE = distributed.SINGLE_PROCESS


class CellParameters(NamedTuple):
    """Parameters of a cell. Convolutions as PyTorch stores them: ``expand`` (E C_in, C_in, 1, 1), ``depthwise``
    (E C_in, 1, K, K), ``project`` (C_out, E C_in, 1, 1); weight and bias of the four batch norms in order; the gate's two
    linear layers, or None for all four."""

    norm_weight: Tensor
    norm_bias: Tensor
    expand: Tensor
    expand_norm_weight: Tensor
    expand_norm_bias: Tensor
    depthwise: Tensor
    depthwise_norm_weight: Tensor
    depthwise_norm_bias: Tensor
    project: Tensor
    project_norm_weight: Tensor
    project_norm_bias: Tensor
    reduce_weight: Tensor | None = None
    reduce_bias: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def gate(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate's two layers, where there is one."""
        return self[-4:]  # type: ignore[return-value]


class BatchStatistics(NamedTuple):
    """``mean`` and biased ``var`` (C,) of what a batch norm saw, and of how many values: what running averages want."""

    mean: Tensor
    var: Tensor
    count: int | Tensor  # type: ignore[assignment]  # tuple.count gives way


compose(NAME, ("depthwise_conv2d", "batch_norm_swish", "channel_statistics", "plane_affine"))


def available(device: torch.device) -> bool:
    """Whether the cell runs fused on this device."""
    return _backend.fused(NAME, device)


def inverted_residual_cell(
    x: Tensor,
    skip: Tensor,
    parameters: CellParameters,
    *,
    stride: int = 1,
    eps: float = 1e-5,
    residual_scale: float = 0.1,
    group: Any = None,
) -> tuple[Tensor, tuple[BatchStatistics, ...]]:
    """The cell with batch statistics; formulas in the module's docstring.

    Args:
        x: (B, C_in, H, W). Channels_last is computed in whatever the format; NCHW costs a transposition of x.
        skip: (B, C_out, H', W') with H' = H, ceil(H / 2) or 2 H; x itself where the skip is the identity.
        parameters: see :class:`CellParameters`.
        stride: 1, 2 or -1 (upsample by 2).
        eps: of all batch norms. residual_scale: factor of the residual branch.
        group: process group over which statistics are merged; None for the default one, if there is any.

    Returns:
        y in the dtype and memory format of skip, and the :class:`BatchStatistics` of the four batch norms in order.
        Differentiable once in x, skip and the parameters; double backward raises.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    check_cell(x, skip, parameters, stride)
    several = distributed.world_size(group) > 1
    if not several:
        group = _SINGLE
        if skip.shape[0] * skip.shape[2] * skip.shape[3] == 1:
            raise ValueError(
                f"{NAME}: expected more than one value per channel to take statistics of, got x {tuple(x.shape)}"
            )
    y, *flat = _Cell.apply(x, None if skip is x else skip, stride, eps, residual_scale, group, *parameters)
    b, _, h, w = x.shape
    seen, made = b * h * w * (4 if stride == -1 else 1), y.shape[0] * y.shape[2] * y.shape[3]
    counts: list[int | Tensor] = list(flat.pop().unbind()) if several else [seen, seen, made, made]
    return y, tuple(map(BatchStatistics, flat[::2], flat[1::2], counts))


def check_cell(x: Tensor, skip: Tensor, parameters: CellParameters, stride: int) -> None:
    """Raise unless x, skip and the parameters fit one another."""
    q = parameters
    if stride not in (1, 2, -1):
        raise ValueError(f"{NAME}: stride must be one of [1, 2, -1], got {stride!r}")
    _checks.feature_map(NAME, "x", x)
    _checks.feature_map(NAME, "expand", q.expand)
    _checks.feature_map(NAME, "depthwise", q.depthwise)
    _checks.feature_map(NAME, "project", q.project)
    (b, c, h, w), (hidden, narrow), k, c_out = (
        x.shape,
        q.expand.shape[:2],
        q.depthwise.shape[3],
        q.project.shape[0],
    )
    if c != narrow:
        raise ValueError(f"{NAME}: x must have {narrow} channels, which is what expand takes, got {c}")
    if k % 2 == 0:
        raise ValueError(f"{NAME}: depthwise must have an odd kernel width, got {k}")
    sizes: list[tuple[int, ...]] = [(c,), (c,), (hidden, c, 1, 1), (hidden,), (hidden,), (hidden, 1, k, k)]
    sizes += [(hidden,), (hidden,), (c_out, hidden, 1, 1), (c_out,), (c_out,)]
    if q.reduce_weight is not None:
        r = q.reduce_weight.shape[0]
        sizes += [(r, c_out), (r,), (c_out, r), (c_out,)]
    out = (2 * h, 2 * w) if stride == -1 else ((h + stride - 1) // stride, (w + stride - 1) // stride)
    named = zip(CellParameters._fields, q, sizes, strict=False)
    _checks.shapes(NAME, x, (*named, ("skip", skip, (b, c_out, *out))))


def _widened(parameters: CellParameters, dtype: torch.dtype) -> CellParameters:
    """The parameters in the dtype of the arithmetic."""
    return CellParameters._make([None if t is None else t.to(dtype) for t in parameters])


def _gram_pays(pixels: int, expanded: int, narrow: int) -> bool:
    """Whether the products with the Gram matrix (forward and backward, multiply-adds) cost less than the passes over the
    expanded map that they replace (16 bytes an element): 15 multiply-adds are done while 4 bytes move. They do not where
    maps are small and channels many: a third of the products of NVAE's 4x4 cells."""
    return 3 * expanded * narrow**2 + 2 * pixels * narrow**2 < 60 * pixels * expanded


def _batch_norm(
    mean: Tensor, m2: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Any, ...]:  # fmt: skip
    """Mean, count, var, 1 / std, scale and shift, with the statistics of every process of ``group``."""
    if group is not _SINGLE:
        return merged_coefficients(mean, m2, count, weight, bias, eps, group)
    count = max(count, 1)
    return mean, count, *coefficients(mean, m2, weight, bias, float(count), eps)


def _corrections(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor, count: Any, group: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of gamma, and beta and gamma of dx = scale g + beta x + gamma; ``group`` as in the forward pass."""
    if group is not _SINGLE:
        return merged_corrections(sum_g, sum_gx, mean, rstd, scale, count, group)
    return corrections(sum_g, sum_gx, mean, rstd, scale, float(count))


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,  # None: x itself
        stride: int,
        eps: float,
        residual_scale: float,
        group: Any,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        device = x.device.type
        identity, single = skip is None, group is _SINGLE
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if x.dtype == torch.float64:
            dtype = torch.float64  # autocast leaves float64 alone
        acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        given = CellParameters._make(parameters)
        q = _widened(given, acc_dtype)
        with torch.autocast(device, enabled=False):
            skip = x if skip is None else skip
            xl = x.to(dtype).contiguous(memory_format=torch.channels_last)
            b, _, h, w = xl.shape
            mean0, m2 = _OPS.channel_statistics(xl, False)
            mean0, n_in, var0, rstd0, _, shift0 = _batch_norm(mean0, m2, b * h * w, None, None, eps, group)
            xhat = affine_activation.forward(xl, rstd0, shift0, None)
            weights = q.expand.flatten(1)
            expand = weights * q.norm_weight
            a = conv1x1(xhat, expand)
            gram = None
            if _gram_pays(b * h * w, *expand.shape):
                rows = xhat.permute(0, 2, 3, 1).reshape(-1, xl.shape[1])
                if dtype == torch.bfloat16 and wide_conv2d.computes(dtype, x.device):
                    gram = wide_conv2d.transposed_product(rows, rows)
                else:
                    rows = rows.to(acc_dtype)
                    gram = rows.t() @ rows
                squares = ((expand @ gram) * expand).sum(1)
            else:
                mean1, squares = _OPS.channel_statistics(a, False)
                if not single:  # the mean of a is 0 over all processes together
                    squares = torch.addcmul(squares, mean1, mean1, value=float(b * h * w))
            mean1, count = weights @ q.norm_bias, float(n_in) if single else 1.0
            if not single:
                squares = distributed.total(squares, group) / n_in
            var1, rstd1, scale1, _ = coefficients(None, squares, q.expand_norm_weight, None, count, eps)

            # A GPU that has no CUDA code of ours runs the formula.
            convolve = _OPS.depthwise_conv2d if device == "cpu" else depthwise_conv2d.kernels(a.device)[0]
            d, mean2, m2 = convolve(
                a, q.depthwise, scale1, q.expand_norm_bias, max(stride, 1), 1, 2 if stride == -1 else 1, "swish", True, None,
            )  # fmt: skip
            pixels = d.shape[2] * d.shape[3]
            mean2, n_out, var2, rstd2, scale2, shift2 = _batch_norm(
                mean2, m2, b * pixels, q.depthwise_norm_weight, q.depthwise_norm_bias, eps, group
            )
            p = conv1x1(affine_activation.forward(d, scale2, shift2, "swish"), q.project)

            plane_mean, m2 = _OPS.channel_statistics(p, True)
            mean3, m2 = merge_planes(plane_mean, m2, pixels)
            mean3, _, var3, rstd3, scale3, shift3 = _batch_norm(
                mean3, m2, b * pixels, q.project_norm_weight, q.project_norm_bias, eps, group
            )
            pooled = hidden = gate = None
            if q.reduce_weight is None:
                factor, offset = (residual_scale * scale3)[None], (residual_scale * shift3)[None]
            else:
                w1, b1, w2, b2 = q.gate
                computed = gate_coefficients(plane_mean, scale3, shift3, w1, b1, w2, b2, residual_scale)
                pooled, hidden, gate, factor, offset = computed
            y = _OPS.plane_affine(p, factor, skip, None, offset)

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            xhat, a, d, p, gram, expand, rstd0, scale1, rstd1, mean2, rstd2, scale2, shift2, mean3, rstd3, scale3,
            plane_mean, pooled, hidden, gate, *given,
        )  # fmt: skip
        ctx.constants = (stride, residual_scale, group, n_in, n_out, x.dtype, skip.dtype, identity)
        statistics: tuple[Tensor, ...] = (mean0, var0, mean1, var1, mean2, var2, mean3, var3)
        if not single:
            upsampled = n_in * (4 if stride == -1 else 1)
            statistics += (torch.stack([upsampled, upsampled, n_out, n_out]),)
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        refuse_double_backward(NAME)
        if grad is None:
            return (None,) * (6 + len(CellParameters._fields))
        (
            xhat, a, d, p, gram, expand, rstd0, scale1, rstd1, mean2, rstd2, scale2, shift2, mean3, rstd3, scale3,
            plane_mean, pooled, hidden, gate, *given,
        ) = ctx.saved_tensors  # fmt: skip
        stride, residual_scale, group, n_in, n_out, x_dtype, skip_dtype, identity = ctx.constants
        kept = CellParameters._make(given)
        acc_dtype, single = expand.dtype, group is _SINGLE
        q = _widened(kept, acc_dtype)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            # y = skip + residual_scale gate (gamma3 phat + beta3): sums over planes say everything about BN3 and gate.
            sum_grad, sum_grad_p = _OPS.plane_dots(grad, p, mean3)
            to_gate: Sequence[Tensor | None] = (None,) * 4
            if gate is None:
                sum3, dot3 = residual_scale * sum_grad.sum(0), residual_scale * sum_grad_p.sum(0)
                _, beta3, gamma3 = _corrections(sum3, dot3, mean3, rstd3, scale3, n_out, group)
                to_weight3, to_bias3, offset = dot3 * rstd3, sum3, gamma3[None]
                factor = (residual_scale * scale3)[None]
            else:
                w1, _, w2, _ = q.gate
                *to_gate, through, to_bias3, to_weight3, factor = gate_backward(
                    sum_grad, sum_grad_p, plane_mean, mean3, rstd3, q.project_norm_weight, q.project_norm_bias, pooled,
                    hidden, gate, w1, w2, residual_scale,
                )  # fmt: skip
                _, beta3, gamma3 = _corrections(
                    to_bias3, to_weight3 / rstd3, mean3, rstd3, scale3, n_out, group
                )
                offset = torch.addcmul(gamma3, scale3, through, value=1.0 / (p.shape[2] * p.shape[3]))
                factor = scale3 * factor
            to_p = _OPS.plane_affine(grad, factor, p, beta3[None], offset)

            to_h3 = conv1x1(to_p, q.project.transpose(0, 1))
            to_bias2, dot2, g, h3 = affine_activation.reduce(
                to_h3, d, scale2, shift2, mean2, "swish", True, True
            )
            del to_h3
            to_project = weight_gradient(to_p, h3)
            del h3, to_p
            to_weight2, beta2, gamma2 = _corrections(to_bias2, dot2, mean2, rstd2, scale2, n_out, group)
            to_a, to_depthwise, dot1, to_bias1 = depthwise_conv2d.kernels(a.device)[1](
                g, d, scale2, beta2, gamma2, None, a, q.depthwise, scale1, q.expand_norm_bias,
                max(stride, 1), 1, 2 if stride == -1 else 1, "swish", None, True, True, True,
            )  # fmt: skip
            del g

            # da = to_a + beta1 a + gamma1, written only where the Gram matrix does not pay.
            to_weight1, beta1, gamma1 = _corrections(to_bias1, dot1, None, rstd1, scale1, n_in, group)
            column = beta1[:, None]
            if gram is None:
                to_a = _OPS.plane_affine(a, beta1[None], to_a, None, gamma1[None])
                to_expand = weight_gradient(to_a, xhat).flatten(1).to(acc_dtype)
            else:
                to_expand = torch.addcmul(
                    weight_gradient(to_a, xhat).flatten(1).to(acc_dtype), column, expand @ gram
                )
                if not single:  # the mean of xhat is 0 over all processes together
                    to_expand += gamma1[:, None] * as_matrix(xhat).to(acc_dtype).sum(0)
            to_x = None
            if ctx.needs_input_grad[0]:
                dot0 = (to_expand * expand).sum(0)
                dot0 = (dot0 if single else distributed.total(dot0, group)) / n_in
                to_x = conv1x1(to_a, (expand * rstd0).t())
                if gram is None:
                    to_x = _OPS.plane_affine(xhat, -(rstd0 * dot0)[None], to_x, None, None)
                else:
                    mixing = (expand * column).t() @ expand - torch.diag(dot0)
                    to_x += conv1x1(xhat, rstd0[:, None] * mixing, rstd0 * (gamma1 @ expand))
                to_x = to_x.to(x_dtype)
                if identity:
                    to_x = to_x + grad
            weights = q.expand.flatten(1)
            gradients = CellParameters(
                (to_expand * weights).sum(0), torch.zeros_like(q.norm_bias),
                (to_expand * q.norm_weight).view_as(q.expand), to_weight1, to_bias1,
                to_depthwise, to_weight2, to_bias2, to_project, to_weight3, to_bias3,
                *to_gate,
            )  # fmt: skip
        flat = [
            None if g is None or k is None else g.to(k.dtype) for g, k in zip(gradients, kept, strict=True)
        ]
        return (to_x, grad.to(skip_dtype) if ctx.needs_input_grad[1] else None, None, None, None, None, *flat)
