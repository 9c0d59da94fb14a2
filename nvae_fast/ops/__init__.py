"""Functional operators, one module each. All are defined before kernels are looked for: the extension must know every one."""

from nvae_fast.ops import (  # noqa: F401
    _adamax,
    _folded_cell,
    _op,
    _spectral,
    elu,
    mixture_logistic,
    normal_log_prob,
    normal_sample,
    philox,
    residual_normal,
    weight_norm,
    weight_norm_many,
)

_op.load_kernels()
