"""The configuration of an NVAE: architecture options by their well-known names, validated, and quantities derived from them.

NVAE (arXiv 2007.03898), table 6 and appendix A; specification sections 3, 4 and 6.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from nvae_fast.models.architectures import ARCHITECTURES


@dataclass(frozen=True)
class ImageFormat:
    """The images of a dataset: height and width in pixels, channels, whether they are binary, and the width of the border
    that is padding and left out of the reconstruction term."""

    size: int
    channels: int
    binary: bool
    border: int = 0


DATASETS: Mapping[str, ImageFormat] = {
    "mnist": ImageFormat(32, 1, True, border=2),
    "omniglot": ImageFormat(32, 1, True, border=2),
    "cifar10": ImageFormat(32, 3, False),
    "imagenet_32": ImageFormat(32, 3, False),
    "imagenet_64": ImageFormat(64, 3, False),
    "celeba_64": ImageFormat(64, 3, False),
    "celeba_256": ImageFormat(256, 3, False),
    "ffhq": ImageFormat(256, 3, False),
    **{
        f"lsun_{place}_{size}": ImageFormat(size, 3, False)
        for place in ("bedroom", "church", "tower")
        for size in (64, 128, 256)
    },
    "digits": ImageFormat(32, 1, True),
    "photos": ImageFormat(32, 3, False),
}
# Larger options are mistakes, which would take hours or all memory before anything reports them.
MOST = 65536
MOST_SCALES = 16
MOST_CELLS = 10_000
LIKELIHOODS = ("bernoulli", "mixture_logistic", "normal")


def _plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as a Python value, a float without fraction as an int; anything else as it is."""
    if isinstance(value, (numpy.generic, numpy.ndarray, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class NVAEConfig:
    """Options of an :class:`nvae_fast.NVAE`.

    Attributes:
        dataset: decides image size, channels and likelihood; one of ``DATASETS``, or "custom" with the three overrides.
        num_channels_enc, num_channels_dec: width of the towers at the finest resolution, channels.
        num_latent_scales: spatial scales of latent variables.
        num_groups_per_scale: latent groups at the finest scale.
        ada_groups: halve the groups at every coarser scale, down to ``min_groups_per_scale``.
        min_groups_per_scale: lower bound of the above.
        num_latent_per_group: channels Z of a latent variable.
        num_preprocess_blocks, num_postprocess_blocks: halvings before and doublings after the towers; must be equal.
        num_preprocess_cells, num_postprocess_cells: cells in each such block.
        num_cell_per_cond_enc, num_cell_per_cond_dec: cells per group in the towers.
        num_nf: flow cells per group in the posterior.
        use_se: squeeze-and-excitation in every cell.
        res_dist: posterior relative to the prior (residual normal distributions).
        num_mixture_dec: components of the logistic mixture of RGB images; 1 means a normal likelihood.
        num_x_bits: bits per colour, 1 to 8.
        arch_instance: architecture of the cells, one of ``ARCHITECTURES``.
        image_size, image_channels, likelihood: override what the dataset implies (height and width, channels, one of
            ``LIKELIHOODS``); None keeps it.

    Raises:
        ValueError, TypeError: an option is out of range or the options do not fit together; the message says how to mend it.
    """

    dataset: str = "mnist"
    num_channels_enc: int = 32
    num_channels_dec: int = 32
    num_latent_scales: int = 1
    num_groups_per_scale: int = 10
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_latent_per_group: int = 20
    num_preprocess_blocks: int = 2
    num_preprocess_cells: int = 3
    num_postprocess_blocks: int = 2
    num_postprocess_cells: int = 3
    num_cell_per_cond_enc: int = 1
    num_cell_per_cond_dec: int = 1
    num_nf: int = 0
    use_se: bool = True
    res_dist: bool = True
    num_mixture_dec: int = 10
    num_x_bits: int = 8
    arch_instance: str = "res_mbconv"
    image_size: int | None = None
    image_channels: int | None = None
    likelihood: str | None = None

    @classmethod
    def preset(cls, name: str) -> NVAEConfig:
        """The model of a preset by ``name``: the published mnist, cifar10, celeba_64, imagenet_32, celeba_256 and ffhq, and
        digits_demo, a small model of the built-in digits.

        Raises:
            ValueError: there is no such preset.
        """
        from nvae_fast.models.presets import MODEL_PRESETS

        if name not in MODEL_PRESETS:
            raise ValueError(f"NVAEConfig.preset: name must be one of {sorted(MODEL_PRESETS)}, got {name!r}")
        return cls(**MODEL_PRESETS[name])

    @classmethod
    def from_official(cls, args: Any) -> NVAEConfig:
        """From the arguments ``args`` of an official run: a Mapping, a Namespace or a configuration object with ``keys()``.
        Unknown keys are ignored, missing ones get their defaults (old checkpoints lack ada_groups, min_groups_per_scale and
        num_mixture_dec). A number may be a NumPy or PyTorch scalar, and an int a float without fraction.

        Raises:
            TypeError: ``args`` is neither. ValueError: a value is out of range.
        """
        if isinstance(args, Mapping) or callable(getattr(type(args), "keys", None)):
            values = {key: args[key] for key in args.keys()}  # noqa: SIM118  # ml_collections iterates otherwise
        elif hasattr(args, "__dict__"):
            values = vars(args)
        else:
            raise TypeError(
                f"NVAEConfig.from_official: args must be a Mapping or a Namespace, got {type(args).__name__}"
            )
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: _plain(value) for key, value in values.items() if key in names})

    def replace(self, **changes: Any) -> NVAEConfig:
        """A copy with ``changes``, validated again.

        Raises:
            TypeError: an option has no such name.
        """
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise TypeError(f"NVAEConfig.replace: unknown options {unknown}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; ``NVAEConfig(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)

    @property
    def _format(self) -> ImageFormat:
        return DATASETS.get(self.dataset, ImageFormat(0, 0, False))

    @property
    def resolution(self) -> int:
        """Height and width of the images in pixels."""
        return self.image_size or self._format.size

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.image_channels or self._format.channels

    @property
    def likelihood_name(self) -> str:
        """``"bernoulli"``, ``"mixture_logistic"`` or ``"normal"``."""
        if self.likelihood is not None:
            return self.likelihood
        if self._format.binary:
            return "bernoulli"
        return "normal" if self.num_mixture_dec == 1 else "mixture_logistic"

    @property
    def reconstruction_border(self) -> int:
        """Pixels at each side that the reconstruction term leaves out (mnist and omniglot are padded from 28 to 32)."""
        return self._format.border if self.image_size is None else 0

    @property
    def dims(self) -> int:
        """Data dimensions of an image, for bits per dimension."""
        return (self.resolution - 2 * self.reconstruction_border) ** 2 * self.channels

    @property
    def head_channels(self) -> int:
        """Channels of the likelihood's parameters."""
        return {
            "bernoulli": self.channels,
            "mixture_logistic": 10 * self.num_mixture_dec,
            "normal": 2 * self.channels,
        }[self.likelihood_name]

    @property
    def groups_per_scale(self) -> list[int]:
        """Latent groups of each scale, coarsest first (the order in which they are drawn)."""
        groups = [self.num_groups_per_scale]
        while len(groups) < self.num_latent_scales:
            groups.append(max(self.min_groups_per_scale, groups[-1] // 2) if self.ada_groups else groups[-1])
        return groups[::-1]

    @property
    def num_groups(self) -> int:
        """Latent groups of all scales, G."""
        return sum(self.groups_per_scale)

    @property
    def num_cells(self) -> int:
        """Cells of the model, those of the flows included, without combiners."""
        outside = self.num_preprocess_blocks * self.num_preprocess_cells
        outside += self.num_postprocess_blocks * self.num_postprocess_cells
        if self.is_vanilla:
            return outside + self.num_nf
        encoder = self.num_groups * self.num_cell_per_cond_enc
        decoder = (self.num_groups - 1) * self.num_cell_per_cond_dec
        between = 2 * (self.num_latent_scales - 1)
        return outside + encoder + decoder + between + self.num_groups * self.num_nf

    @property
    def is_vanilla(self) -> bool:
        """One scale, one group: no towers."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1

    @property
    def top_multiplier(self) -> int:
        """Channel multiplier at the coarsest scale."""
        return 2 ** (self.num_preprocess_blocks + self.num_latent_scales - 1)

    @property
    def z_shapes(self) -> list[tuple[int, int, int]]:
        """(Z, H, W) of every group, in the order in which they are drawn."""
        side = self.resolution // self.top_multiplier
        return [
            (self.num_latent_per_group, side * 2**scale, side * 2**scale)
            for scale, groups in enumerate(self.groups_per_scale)
            for _ in range(groups)
        ]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = str(field.type).split(" ")[0]
            types: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool, int), "str": (str,)}
            expected = types[kind]
            optional = "None" in str(field.type)
            if isinstance(value, numpy.generic):
                value = value.item()
                object.__setattr__(self, field.name, value)
            wrong = not isinstance(value, expected) or (kind == "int" and isinstance(value, bool))
            if wrong and not (optional and value is None):
                raise TypeError(f"NVAEConfig: {field.name} must be {field.type}, got {reprlib.repr(value)}")
            if kind == "bool":
                object.__setattr__(self, field.name, bool(value))
            lowest = 0 if field.name in ("num_nf", "num_preprocess_blocks", "num_postprocess_blocks") else 1
            if kind == "int" and value is not None and value < lowest:
                raise ValueError(f"NVAEConfig: {field.name} must be >= {lowest}, got {value}")
            highest = MOST_SCALES if field.name == "num_latent_scales" else MOST
            if kind == "int" and value is not None and value > highest:
                raise ValueError(f"NVAEConfig: {field.name} must be <= {highest}, got {reprlib.repr(value)}")
        self._validate()

    def _validate(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"NVAEConfig: {message}")

        custom = self.dataset == "custom"
        known = (
            f"one of {sorted(DATASETS)}, or 'custom' together with image_size, image_channels and likelihood"
        )
        require(
            custom or self.dataset in DATASETS, f"dataset must be {known}, got {reprlib.repr(self.dataset)}"
        )
        if custom:
            given = {n: getattr(self, n) for n in ("image_size", "image_channels", "likelihood")}
            missing = [n for n, value in given.items() if value is None]
            require(not missing, f"dataset 'custom' also needs {', '.join(missing)}")
        require(
            self.arch_instance in ARCHITECTURES,
            f"arch_instance must be one of {sorted(ARCHITECTURES)}, got {reprlib.repr(self.arch_instance)}",
        )
        require(
            self.likelihood is None or self.likelihood in LIKELIHOODS,
            f"likelihood must be one of {list(LIKELIHOODS)} or None, got {reprlib.repr(self.likelihood)}",
        )
        halvings = self.num_preprocess_blocks + self.num_latent_scales - 1
        require(
            halvings < 32,  # before anything is computed from two to that power
            f"num_preprocess_blocks + num_latent_scales - 1, the halvings of an image, must be < 32, got {halvings}",
        )
        require(
            self.likelihood_name != "mixture_logistic" or self.channels == 3,
            f"the logistic mixture is for RGB images (3 channels), got {self.channels} channels: use likelihood='normal'",
        )
        require(
            self.num_channels_enc >= 2 or self.top_multiplier == 1,
            f"num_channels_enc must be >= 2 where images are halved, got {self.num_channels_enc}",
        )
        require(
            self.num_cells <= MOST_CELLS,
            f"the options ask for {self.num_cells} cells, at most {MOST_CELLS} are possible: choose a smaller "
            "num_groups_per_scale, or fewer cells",
        )
        require(1 <= self.num_x_bits <= 8, f"num_x_bits must be between 1 and 8, got {self.num_x_bits}")
        require(
            self.num_preprocess_blocks == self.num_postprocess_blocks,
            "num_preprocess_blocks and num_postprocess_blocks must be equal (as many halvings as doublings), "
            f"got {self.num_preprocess_blocks} and {self.num_postprocess_blocks}",
        )
        require(
            self.resolution % self.top_multiplier == 0,
            f"images of {self.resolution} pixels cannot be halved {self.num_preprocess_blocks} (num_preprocess_blocks) + "
            f"{self.num_latent_scales - 1} (num_latent_scales - 1) times; the size must be a multiple of {self.top_multiplier}",
        )
