"""Defines every operator, then loads the C++ kernels: the binary is held against all schemas before it is loaded."""

from __future__ import annotations

import torch

from nvae_fast.ops import (  # noqa: F401
    _backend,
    _extension,
    _op,
    adamax,
    affine_activation,
    batch_norm_swish,
    channel_statistics,
    depthwise_conv2d,
    elu,
    mixture_logistic,
    normal_log_prob,
    normal_sample,
    philox,
    plane_affine,
    residual_normal,
    spectral_norm,
    squeeze_excite,
    weight_norm,
    weight_norm_many,
    winograd,
)
from nvae_fast.ops.inverted_residual import coefficients, eval, train  # noqa: F401


def _record(operator: str, row: str, key: str) -> None:
    """Note what runs an operator on a device, or why nothing does."""
    kernel, reason = {"CPU": "cpp", "CUDA": "cuda"}[key], ""
    qualified = f"{_op.NAMESPACE}::{operator}"
    if key == "CUDA" and _op.DEFINITIONS[operator].launch is not None:
        kernel, reason = "triton", _backend.triton_reason() or ""
    elif not (_extension.load() and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)):
        without = _extension.NO_CUDA if key == "CUDA" and not _extension.has_cuda() else ""
        reason = _extension.reason() or without or "PyTorch's own kernels are used for this op"
    _backend.record(row, key.lower(), None if reason else kernel, reason)


_extension.load()
for _operator, _row in _op.LISTED.items():
    for _key in ("CPU", "CUDA"):
        _record(_operator, _row, _key)
for _name, _parts in _op.COMPOSED.items():  # fused where all parts are
    for _device in _backend.DEVICES:
        _kinds = [_backend.kernel(part, _device) for part in _parts]
        _missing = [part for part, kind in zip(_parts, _kinds, strict=True) if kind is None]
        _why = f"{', '.join(_missing)} has no fused kernel" if _missing else ""
        _backend.record(_name, _device, None if _missing else _kinds[0], _why, _kinds)
