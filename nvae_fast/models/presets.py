"""Architecture options of the published settings (NVAE, arXiv 2007.03898, table 6; specification section 7), and of a small
model for the built-in digits.

The training recipes that belong to them are in ``nvae_fast.training``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _preset(dataset: str, scales: int, groups: int, channels: int, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        dataset=dataset,
        num_latent_scales=scales,
        num_groups_per_scale=groups,
        ada_groups=scales > 1,
        num_latent_per_group=20,
        num_channels_enc=channels,
        num_channels_dec=channels,
        num_preprocess_blocks=1,
        num_postprocess_blocks=1,
        num_preprocess_cells=2,
        num_postprocess_cells=2,
        num_cell_per_cond_enc=2,
        num_cell_per_cond_dec=2,
        use_se=True,
        res_dist=True,
    )
    return {**options, **changes}


# Two halvings before the first latent scale keep nearly all work at 8x8 and 4x4; the digits are upscaled 8x8
# scans, so nothing is lost by it. Two groups at 8x8 on top of one at 4x4 are enough for samples that look
# like digits.
_DIGITS_MODEL = {
    "dataset": "digits",
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "ada_groups": True,
    "min_groups_per_scale": 1,
    "num_latent_per_group": 8,
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
}

MODEL_PRESETS: Mapping[str, dict[str, Any]] = {
    "mnist": _preset(
        "mnist", 2, 10, 32,
        num_preprocess_blocks=2, num_postprocess_blocks=2, num_preprocess_cells=3, num_postprocess_cells=3,
    ),
    "cifar10": _preset("cifar10", 1, 30, 128, num_nf=1),
    "celeba_64": _preset("celeba_64", 3, 20, 64, num_nf=1),
    "imagenet_32": _preset("imagenet_32", 1, 28, 192, num_nf=1),
    "celeba_256": _preset("celeba_256", 5, 16, 30, num_nf=2, num_x_bits=5, min_groups_per_scale=4),
    "digits_demo": _DIGITS_MODEL,
    "ffhq": _preset("ffhq", 5, 16, 30, num_nf=2, num_x_bits=5, min_groups_per_scale=4),
}  # fmt: skip
