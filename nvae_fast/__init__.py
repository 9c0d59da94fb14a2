"""nvae_fast: NVAE, exact and fast, on today's PyTorch.

Importing this package neither initialises CUDA nor imports triton.
"""

from nvae_fast import data, distributions, nn, training
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.frozen import freeze
from nvae_fast.models.latents import interpolate_latents
from nvae_fast.models.nvae import NVAE, NVAEOutput
from nvae_fast.models.official import load_official, save_official
from nvae_fast.ops._backend import backends, use_backend
from nvae_fast.ops.batch_norm_swish import batch_norm_swish
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.mixture_logistic import (
    mixture_logistic_log_prob,
    mixture_logistic_mean,
    mixture_logistic_sample,
)
from nvae_fast.ops.normal_log_prob import normal_log_prob
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.philox import philox_normal
from nvae_fast.ops.residual_normal import ResidualNormal, residual_normal
from nvae_fast.ops.squeeze_excite import squeeze_excite
from nvae_fast.ops.weight_norm import weight_norm
from nvae_fast.ops.weight_norm_many import weight_norm_many
from nvae_fast.patching import AccelerationReport, accelerate, acceleration_report, restore
from nvae_fast.version import __version__

__all__ = [
    "NVAE",
    "AccelerationReport",
    "NVAEConfig",
    "NVAEOutput",
    "ResidualNormal",
    "__version__",
    "accelerate",
    "acceleration_report",
    "backends",
    "batch_norm_swish",
    "data",
    "depthwise_conv2d",
    "distributions",
    "freeze",
    "interpolate_latents",
    "load_official",
    "mixture_logistic_log_prob",
    "mixture_logistic_mean",
    "mixture_logistic_sample",
    "nn",
    "normal_log_prob",
    "normal_sample",
    "philox_normal",
    "residual_normal",
    "restore",
    "save_official",
    "squeeze_excite",
    "training",
    "use_backend",
    "weight_norm",
    "weight_norm_many",
]
