"""Drawing images again and again: on a GPU one CUDA graph launch a batch, elsewhere the same code eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.models.frozen import freeze
from nvae_fast.models.inputs import group_temperatures
from nvae_fast.ops import _checks
from nvae_fast.training.graph import CapturedFunction, CudaRecorder, DeviceScalars, Recorder
from nvae_fast.training.seeds import mix_seed

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

PIXELS = ("sample", "mean", "logits")


class Sampler:
    """Images from the prior of `model` with the weights and statistics that it has when the sampler is made: it keeps a frozen
    copy (:func:`nvae_fast.freeze`). After training on, make another sampler.

    temperature: multiplies every prior's sigma; one number, or one for each group, coarsest scale first.
    pixel_temperature: multiplies the likelihood's noise. None: `temperature` where that is one number, else 1.
    pixels: "sample" draws them from the likelihood, "mean" takes its mean, "logits" returns its parameters. autocast: None
    or "bf16", for the network alone. recorder: what captures, in tests. Raises ValueError for other values.

    On a GPU the newest batch size is kept captured. The same seed gives the same images, replayed or not.
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
        if autocast not in (None, "bf16"):
            raise ValueError(f"Sampler: autocast must be None or 'bf16', got {autocast!r}")
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
        self._image_seeds: Tensor | None = None  # (2, n): one seed an image, for both
        if recorder is None and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        self._replay = CapturedFunction(recorder) if recorder is not None else None

    @torch.no_grad()
    def __call__(
        self, n: int, *, seed: int, pixel_seed: int | None = None, first: int | None = None
    ) -> Tensor:
        """`n` images (N,C,H,W) in [0,1] (or the likelihood's parameters), on the model's device, the caller's own.

        pixel_seed: of the likelihood's noise, by default another stream of `seed`. first: the number of the first image;
        image `first + i` is then drawn from streams of its own, the same in any batch and on any process. None: one
        stream for the batch, which is faster by a launch or two an image where launches count.
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
        """What a graph holds: `n` images, from the seeds written last."""
        enabled = self.autocast == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            seed = self._latent.seed if self._image_seeds is None else self._image_seeds[0]
            logits = self.model.sample(n, self._temperatures, seed=seed)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
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
