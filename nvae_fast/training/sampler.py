"""Repeated sampling of images: one CUDA graph launch per batch on a GPU, the same code eagerly elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.models.frozen import freeze
from nvae_fast.models.inputs import group_temperatures
from nvae_fast.ops import _checks
from nvae_fast.training import precision
from nvae_fast.training.graph import CapturedFunction, CudaRecorder, DeviceScalars, Recorder
from nvae_fast.training.objective import full_precision
from nvae_fast.training.seeds import mix_seed

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

PIXELS = ("sample", "mean", "logits")


class Sampler:
    """Draws images from the prior of `model`, of which it keeps a frozen copy (:func:`nvae_fast.freeze`). Later changes of the
    model's weights have no effect; make another sampler after further training.

    temperature: multiplies the sigma of every prior; one number, or one for each group, coarsest scale first.
    pixel_temperature: multiplies the noise of the likelihood. None: `temperature` where that is one number, else 1.
    pixels: "sample" draws from the likelihood, "mean" takes its mean, "logits" returns its parameters. autocast: None,
    "bf16" or "fp16", for the network only. recorder: replaces the CUDA graph capture in tests. Raises ValueError for others.

    On a GPU the graph of the latest batch size is kept. The same seed gives the same images, with and without a graph.
    """

    def __init__(
        self,
        model: NVAE,
        *,
        temperature: float | Sequence[float] = 1.0,
        pixel_temperature: float | None = None,
        pixels: str = "sample",
        autocast: str | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if pixels not in PIXELS:
            raise ValueError(f"Sampler: pixels must be one of {', '.join(PIXELS)}, got {pixels!r}")
        if autocast not in (None, *precision.DTYPES):
            raise ValueError(f"Sampler: autocast must be None, 'bf16' or 'fp16', got {autocast!r}")
        temperatures = group_temperatures("Sampler", temperature, model.config.num_groups)
        if pixel_temperature is None:
            pixel_temperature = temperature if isinstance(temperature, (int, float)) else 1.0
        elif pixels == "sample":
            _checks.temperature("Sampler", pixel_temperature, zero=False, name="pixel_temperature")
        frozen: Any = freeze(model)
        self.model: NVAE = frozen
        self.temperature, self.pixel_temperature = temperature, pixel_temperature
        self._temperatures = temperatures
        self.pixels = pixels
        self.autocast = autocast
        self.device: torch.device = frozen.top_feature.device
        # Two streams of noise: of the latent variables and of the pixels.
        self._latent = DeviceScalars((), self.device)
        self._pixel = DeviceScalars((), self.device)
        self._image_seeds: Tensor | None = None  # (2, n): one seed per image, for each of the two
        if recorder is None and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        self._replay = CapturedFunction(recorder) if recorder is not None else None

    @torch.no_grad()
    def __call__(
        self, n: int, *, seed: int, pixel_seed: int | None = None, first: int | None = None
    ) -> Tensor:
        """Draw `n` images (N,C,H,W) in [0,1], or the likelihood's parameters, on the model's device.

        pixel_seed: seed of the likelihood's noise, by default derived from `seed`. first: number of the first image; image
        `first + i` is then drawn from its own streams, which are the same in any batch and on any process. None: one stream
        for the batch, which saves one or two launches per image.
        """
        n, seed = _checks.whole("Sampler", "n", n), _checks.whole("Sampler", "seed", seed)
        if first is None:
            self._image_seeds = None
            self._latent.write(seed)
            self._pixel.write(seed ^ 0x9E3779B97F4A7C15 if pixel_seed is None else pixel_seed)
        else:
            self._write_image_seeds(n, first, seed, seed if pixel_seed is None else pixel_seed)
        if self._replay is None:
            return self.body(n)
        if not self._replay.ready((n, first is None)):
            images: Tensor = self._replay.warm_up(lambda: self.body(n))
            return images
        replayed: Tensor = self._replay.run(lambda: self.body(n))
        return replayed.clone()

    def body(self, n: int) -> Tensor:
        """The captured function: `n` images from the seeds written last."""
        with precision.autocast(self.autocast, self.device):
            seed = self._latent.seed if self._image_seeds is None else self._image_seeds[0]
            logits = self.model.sample(n, self._temperatures, seed=seed)
        logits = full_precision(logits)
        if self.pixels == "logits":
            return logits
        likelihood = self.model.likelihood(logits)
        if self.pixels == "mean":
            return likelihood.mean()
        seed = self._pixel.seed if self._image_seeds is None else self._image_seeds[1]
        return likelihood.sample(temperature=self.pixel_temperature, seed=seed)

    def _write_image_seeds(self, n: int, first: int, seed: int, pixel_seed: int) -> None:
        values = [
            [mix_seed(parent, first + i, purpose) for i in range(n)]
            for purpose, parent in enumerate((seed, pixel_seed))
        ]
        if (
            self._image_seeds is None or self._image_seeds.shape[1] != n
        ):  # a capture reads them where they are
            self._image_seeds = torch.empty(2, n, dtype=torch.int64, device=self.device)
        self._image_seeds.copy_(torch.tensor(values, dtype=torch.int64).view(2, n))
