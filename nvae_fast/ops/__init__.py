"""Functional operators, one module each. All are defined before kernels are looked for: the extension must know every one."""

from nvae_fast.ops import (  # noqa: F401
    _adamax,
    _folded_cell,
    _op,
    _spectral,
    batch_norm_swish,
    channel_statistics,
    depthwise_conv2d,
    elu,
    inverted_residual_cell,
    mixture_logistic,
    normal_log_prob,
    normal_sample,
    philox,
    plane_affine,
    residual_normal,
    squeeze_excite,
    weight_norm,
    weight_norm_many,
)

_op.load_kernels()
