"""What a model is given: images, noise or seeds, latent variables and temperatures of its groups, checked before anything is
computed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nvae_fast import distributed
from nvae_fast.models.seeds import check_per_image, is_per_image, per_image_noise
from nvae_fast.nn import BatchNormSwish
from nvae_fast.ops import _checks
from nvae_fast.ops._pixels import can_read, check_unit_range, warn_if_gray
from nvae_fast.ops.philox import split_seed

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

Draw = tuple[torch.Tensor | None, torch.Tensor | None]
"""Noise and seed of a group, exactly one of them given."""

Shapes = Sequence[tuple[int, int, int]]


def check_images(op: str, model: NVAE, x: Any) -> None:
    """Raise for images that a layer inside would refuse, before the batch norms in front of it count the batch."""
    c = model.config
    expected = (c.channels, c.resolution, c.resolution)
    if not isinstance(x, torch.Tensor):
        kind = type(x)
        raise TypeError(
            f"{op}: x must be a torch.Tensor, got {kind.__module__}.{kind.__qualname__}"
            + _checks.how_to_convert(x)
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: x must be of a floating-point dtype with values in [0, 1], got {x.dtype}: give x.float() / 255 for 8-bit "
            "pixels"
        )
    if x.dim() != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"{op}: x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
        )
    own = model.stem.weight
    _checks.tensor(op, "stem.weight", own)
    if x.device != own.device:
        raise ValueError(f"{op}: x must be on {own.device} like the model, got {x.device}")
    if x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: x must be {own.dtype} like the model (or use torch.autocast), got {x.dtype}")
    if model.training and x.shape[0] * c.z_shapes[0][1] ** 2 == 1:
        norms = [m for m in model.modules() if isinstance(m, BatchNormSwish) and m.training]
        if norms and distributed.world_size(norms[0].process_group) == 1:
            raise ValueError(
                f"{op}: batch norm needs more than one value per channel while training and the coarsest scale has one "
                f"pixel: x must hold at least 2 images, got {tuple(x.shape)}"
            )
    if model.training and (op, True) not in model._checked:
        _refuse_sharded_initialisation(op, model)
    check_range(op, model, x)


def _refuse_sharded_initialisation(op: str, model: NVAE) -> None:
    """RuntimeError where the first batch would initialise layers of which FSDP2 keeps no change made in a forward."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    waiting = [name for name, module in model.named_modules() if getattr(module, "needs_data_init", False)]
    if not waiting:
        return
    from torch.distributed.fsdp import FSDPModule  # half a second to import

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise RuntimeError(
            f"{op}: the first training batch initialises {len(waiting)} layers ({waiting[0]}, ...), and fully_shard loses what "
            "a forward writes to parameters: call the model once in training mode before fully_shard, or load a state"
        )


def check_range(op: str, model: NVAE, x: torch.Tensor, *, warn_gray: bool = False) -> None:
    """ValueError unless x is in [0, 1]. On a GPU only the first images of each mode are looked at, for it waits.

    warn_gray: also warn of the first images that are not binary where the likelihood is Bernoulli.
    """
    first = (op, model.training) not in model._checked
    if not can_read(x) or (x.is_cuda and not first):
        return
    check_unit_range(op, "x", x)
    if first and warn_gray and model.config.likelihood_name == "bernoulli":
        warn_if_gray(op, "x", x)
    model._checked.add((op, model.training))


def warn_if_training(op: str, model: NVAE) -> None:
    """Warn that a model that images are drawn from is in training mode; while compiling, nothing is said."""
    if model.training and not torch.compiler.is_compiling():
        warnings.warn(
            f"{op}: the model is in training mode, so that batch norm takes the statistics of these samples and moves its "
            "running ones: call model.eval() first, or nvae_fast.freeze(model)",
            stacklevel=3,
        )


def group_draws(
    op: str,
    name: str,
    given: Any,
    seed: int | torch.Tensor | None,
    n: int,
    shapes: Shapes,
    like: torch.Tensor,
) -> list[Draw]:
    """Noise or seed of every group.

    Args:
        op, name: in error messages.
        given: a tensor (n, Z, H, W) or None for each group; a group with a tensor takes no seed. None: no group has one.
        seed: an int, a 0-d int64 tensor, None, or one for each image (n,).
        n: number of images. shapes: (Z, H, W) of every group. like: a tensor of the device and dtype that noise must have.
    """
    groups = len(shapes)
    given = [None] * groups if given is None else check_groups(op, name, given, groups)
    if len(given) != groups:
        raise ValueError(f"{op}: {name} must have one entry per group ({groups}), got {len(given)}")
    for i, (value, shape) in enumerate(zip(given, shapes, strict=True)):
        if value is not None:
            _checks.shape(op, f"{name}[{i}]", value, (n, *shape), like)
    if all(value is not None for value in given):
        return [(value, None) for value in given]
    if is_per_image(seed):
        check_per_image(op, seed, n, like.device)
        drawn = per_image_noise(seed, shapes, like.dtype)
        return [(own if value is None else value, None) for own, value in zip(drawn, given, strict=True)]
    seeds = split_seed(_checks.seed(op, seed, like.device), groups).unbind()
    return [(None, seeds[i]) if value is None else (value, None) for i, value in enumerate(given)]


def posterior_draws(op: str, model: NVAE, x: Any, noise: Any, seed: Any, sample: bool) -> list[Draw]:
    """Noise or seed of every group to encode images ``x``: zeros, which give the means, unless ``sample``."""
    _checks.flag(op, "sample", sample)
    check_images(op, model, x)
    shapes = model.config.z_shapes
    if sample:
        return group_draws(op, "noise", noise, seed, x.shape[0], shapes, model.top_feature)
    if noise is not None or seed is not None:
        given = "seed" if noise is None else "noise"
        raise ValueError(f"{op}: {given} must be None where sample=False takes the posterior means")
    return [(x.new_zeros(x.shape[0], *shape), None) for shape in shapes]


def check_groups(op: str, name: str, value: Any, groups: int) -> list[torch.Tensor | None]:
    """``value`` as a list with one entry for each of the first groups, at most ``groups``."""
    if isinstance(value, torch.Tensor) or not isinstance(value, Sequence):
        raise TypeError(
            f"{op}: {name} must be a sequence with one entry per group, got {type(value).__name__}"
        )
    if len(value) > groups:
        raise ValueError(f"{op}: {name} must have one entry per group ({groups}), got {len(value)}")
    return list(value)


def check_latents(op: str, latents: Any, shapes: Shapes, like: torch.Tensor) -> tuple[int, list[Any]]:
    """The batch size of ``latents``, and their list with None for every group that is to be drawn."""
    known = check_groups(op, "latents", latents, len(shapes))
    first = next((z for z in known if z is not None), None)
    if first is None:
        raise ValueError(
            f"{op}: latents must hold a tensor, which has the batch size, got {len(known)} entries of None; "
            "NVAE.sample draws all groups"
        )
    for i, (z, shape) in enumerate(zip(known, shapes, strict=False)):
        if z is None:
            continue
        _checks.feature_map(op, f"latents[{i}]", z)
        _checks.shape(op, f"latents[{i}]", z, (first.shape[0], *shape), like)
        if z.dtype != like.dtype and not torch.is_autocast_enabled(z.device.type):
            raise TypeError(
                f"{op}: latents[{i}] must be {like.dtype} like the model (or use torch.autocast), got {z.dtype}"
            )
    return first.shape[0], known + [None] * (len(shapes) - len(known))


def group_temperatures(op: str, temperature: Any, groups: int) -> list[float]:
    """The temperature of every group, of one number or one for each group, each finite and >= 0."""
    if hasattr(temperature, "tolist"):  # arrays and numbers of NumPy, tensors
        temperature = temperature.tolist()
    if isinstance(temperature, str) or not isinstance(temperature, Sequence):
        _checks.temperature(op, temperature, zero=True)  # type: ignore[arg-type]
        return [temperature] * groups  # type: ignore[list-item]
    if len(temperature) != groups:
        raise ValueError(
            f"{op}: temperature must be one number or one per group ({groups}), got {len(temperature)} numbers"
        )
    for i, value in enumerate(temperature):
        _checks.temperature(op, value, zero=True, name=f"temperature[{i}]")
    return list(temperature)
