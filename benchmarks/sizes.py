"""The shapes that the published settings give every op, taken from the presets themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from benchmarks.case import Shape


@dataclass(frozen=True)
class Preset:
    """A published setting: batch per GPU, latent channels and side at the finest scale, width of the cells
    there, image side, whether its likelihood is the logistic mixture, weight-normed convolution width at the
    finest scale."""

    name: str
    batch: int
    latent: int
    side: int
    width: int
    image: int
    mixture: bool


@cache
def presets() -> tuple[Preset, ...]:
    """The six published settings."""
    import nvae_fast as nf
    from nvae_fast.models.presets import MODEL_PRESETS

    rows = []
    for name in MODEL_PRESETS:
        config = nf.NVAEConfig.preset(name)
        latent, side, _ = config.z_shapes[-1]
        rows.append(
            Preset(
                name,
                nf.training.preset(name).training.batch_size,
                latent,
                side,
                config.num_channels_dec * 2**config.num_preprocess_blocks,
                config.resolution,
                config.likelihood_name == "mixture_logistic",
            )
        )
    return tuple(rows)


def per_preset(
    shape: Callable[[Preset], Shape], where: Callable[[Preset], bool] = lambda p: True
) -> tuple[Shape, ...]:
    """One shape for each preset, without repeats (celeba_256 and ffhq are alike)."""
    return tuple(dict.fromkeys(shape(p) for p in presets() if where(p)))
