"""Every Triton kernel of every operator, forward and backward, bound, compiled and launched on the stand-in GPU.

``python operators.py PART [all]`` prints one line of JSON: what failed, what was compiled, how often each kernel was launched.
A part is a preset's name (its feature maps and latent variables at every resolution, the batch of one GPU) or "odd" (odd
shapes, and operators that know no shapes). With ``all`` in both memory formats and three dtypes; without, in bf16 and
channels_last, and a few odd shapes otherwise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from start import called, device, driver, jit_functions, kernels, nf, torch

from nvae_fast.models.presets import MODEL_PRESETS
from nvae_fast.ops import affine_activation
from nvae_fast.ops.channel_statistics import channel_statistics
from nvae_fast.ops.philox import philox_words, split_seed
from nvae_fast.ops.plane_affine import plane_affine, plane_dots
from nvae_fast.training.presets import preset

Shape = tuple[int, int, int, int]
ODD: tuple[Shape, ...] = ((3, 5, 7, 11), (3, 8, 5, 7), (1, 1, 1, 1), (2, 3, 1, 1), (5, 7, 3, 1))
FORMATS = (torch.channels_last, torch.contiguous_format)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPANSION = 6  # of the decoder's cells
USUAL = (torch.bfloat16, torch.channels_last)  # as presets are trained on a GPU
# Of the other combinations a short run takes these, at these shapes.
OTHERS = ((torch.float32, torch.contiguous_format), (torch.float16, torch.channels_last))
SHORT: tuple[Shape, ...] = ((3, 5, 7, 11), (2, 3, 1, 1))


def resolutions(name: str) -> list[tuple[int, int, bool]]:
    """Channels and pixels a side of a preset's feature maps, and whether latent variables are drawn there."""
    config = nf.NVAEConfig.preset(name)
    halvings = config.num_preprocess_blocks + config.num_latent_scales
    return [
        (config.num_channels_enc * 2**k, config.resolution // 2**k, k >= config.num_preprocess_blocks)
        for k in range(halvings)
    ]


def shapes(name: str) -> tuple[set[Shape], set[Shape], set[Shape]]:
    """Latent variables, feature maps (of cells, and expanded inside them), images."""
    config, batch = nf.NVAEConfig.preset(name), preset(name).training.batch_size
    latents, features = set(), set()
    for channels, side, drawn in resolutions(name):
        features |= {(batch, channels, side, side), (batch, EXPANSION * channels, side, side)}
        if drawn:
            latents.add((batch, config.num_latent_per_group, side, side))
    return latents, features, {(batch, config.channels, config.resolution, config.resolution)}


class Maker:
    """Tensors of one dtype and memory format. Nothing reads them, so nothing writes them."""

    def __init__(self, dtype: torch.dtype, form: torch.memory_format) -> None:
        self.dtype, self.form = dtype, form

    def map(self, shape: Shape, *, grad: bool = True) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.dtype, device="cuda", memory_format=self.form)
        return made.requires_grad_(grad)

    def row(self, *size: int, grad: bool = True) -> torch.Tensor:
        return torch.empty(size, device="cuda").requires_grad_(grad)


def back(*outputs: torch.Tensor) -> None:
    """The backward pass of all outputs, with gradients in their own memory formats."""
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


def seed() -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cuda")


def latent_operators(make: Maker, shape: Shape) -> Iterator[Callable[[], None]]:
    b, z, h, w = shape
    packed = (b, 2 * z, h, w)

    def residual(prior: bool, noise: bool, clamp: float | None) -> None:
        given = {"noise": make.map(shape)} if noise else {"seed": seed()}
        out = nf.residual_normal(make.map(packed), make.map(packed) if prior else None, clamp=clamp, **given)
        back(*out)

    yield lambda: residual(True, False, 5.0)
    yield lambda: residual(False, False, 5.0)
    yield lambda: residual(True, True, 5.0)
    yield lambda: residual(True, False, None)
    yield lambda: back(nf.normal_sample(make.map(packed), temperature=0.7, seed=seed()))
    yield lambda: back(nf.normal_sample(make.map(packed), noise=make.map(shape)))
    yield lambda: back(nf.normal_log_prob(make.map(shape), make.map(packed)))
    yield lambda: back(nf.normal_log_prob(make.map(shape)))


def feature_operators(make: Maker, shape: Shape) -> Iterator[Callable[[], None]]:
    b, c, h, w = shape
    hidden = max(c // 16, 4)
    gate = (hidden, c), (hidden,), (c, hidden), (c,)
    if b * h * w > 1:
        yield lambda: back(nf.batch_norm_swish(make.map(shape), make.row(c), make.row(c)).y)
        yield lambda: back(nf.batch_norm_swish(make.map(shape), make.row(c), make.row(c), activation=None).y)
    yield lambda: back(
        nf.batch_norm_swish(make.map(shape), *(make.row(c) for _ in range(4)), activation="elu").y
    )
    yield lambda: back(*channel_statistics(make.map(shape))[:2])
    yield lambda: back(*channel_statistics(make.map(shape), per_sample=True)[:2])
    yield lambda: back(nf.squeeze_excite(make.map(shape), *(make.row(*size) for size in gate)))
    yield lambda: back(
        nf.squeeze_excite(
            make.map(shape), *(make.row(*size) for size in gate), skip=make.map(shape), residual_scale=0.1
        )
    )
    one, all_ = (1, c), (b, c)
    yield lambda: back(plane_affine(make.map(shape), make.row(*all_), make.map(shape), make.row(*one)))
    yield lambda: back(plane_affine(make.map(shape), make.row(*one), c=make.row(*all_)))
    yield lambda: plane_dots(
        make.map(shape, grad=False), make.map(shape, grad=False), make.row(c, grad=False)
    )

    def affine(activation: str | None) -> None:
        x, grad = make.map(shape, grad=False), make.map(shape, grad=False)
        rows = [make.row(c, grad=False) for _ in range(6)]
        affine_activation.forward(x, *rows[:2], activation)
        affine_activation.reduce(grad, x, *rows[:3], activation, True, True)
        affine_activation.reduce(grad, x, *rows[:2], None, activation, False, False)
        affine_activation.gradient(grad, x, *rows[:5], activation)

    yield lambda: affine("swish")
    yield lambda: affine(None)


def image_operators(make: Maker, shape: Shape) -> Iterator[Callable[[], None]]:
    b, _, h, w = shape
    params, image = (b, 100, h, w), (b, 3, h, w)
    yield lambda: back(nf.mixture_logistic_log_prob(make.map(params), make.map(image, grad=False)))
    yield lambda: back(
        nf.mixture_logistic_log_prob(make.map(params), make.map(image, grad=False), num_bits=5)
    )
    yield lambda: nf.mixture_logistic_sample(make.map(params, grad=False), temperature=0.7, seed=seed())
    yield lambda: nf.mixture_logistic_mean(make.map(params, grad=False))
    yield lambda: nf.philox_normal(shape, seed=seed(), dtype=make.dtype, memory_format=make.form)


def other_operators() -> Iterator[Callable[[], None]]:
    yield lambda: nf.philox_normal((7, 3), seed=seed())
    yield lambda: nf.philox_normal((2, 3, 4, 4), seed=seed(), memory_format=torch.channels_last)
    yield lambda: philox_words(seed(), 5)
    yield lambda: split_seed(seed(), 4)


def weight_operators(name: str, make: Maker) -> Iterator[Callable[[], None]]:
    """All convolutions of a preset with one group a scale, which has every shape; and some with masks."""
    with torch.device("meta"):
        model = nf.NVAE(
            nf.NVAEConfig(**{**MODEL_PRESETS[name], "num_groups_per_scale": 1, "ada_groups": False})
        )
    convs = [m for m in model.modules() if hasattr(m, "log_weight_norm")]
    sizes = [tuple(conv.weight.shape) for conv in convs]

    def masks() -> list[torch.Tensor | None]:
        return [None if c.mask is None else make.map(tuple(c.mask.shape), grad=False) for c in convs]

    def many(dtype: torch.dtype | None) -> None:
        weights = [make.map(size) for size in sizes]  # type: ignore[arg-type]
        norms = [
            torch.empty(size[0], 1, 1, 1, dtype=make.dtype, device="cuda").requires_grad_() for size in sizes
        ]
        back(*nf.weight_norm_many(weights, norms, masks(), dtype=dtype))

    def single(size: tuple[int, ...]) -> None:
        norm = torch.empty(size[0], 1, 1, 1, dtype=make.dtype, device="cuda").requires_grad_()
        back(nf.weight_norm(make.map(size), norm))  # type: ignore[arg-type]

    yield lambda: many(None)
    if make.dtype == torch.float32:
        yield lambda: many(torch.bfloat16)
    yield lambda: single(sizes[0])


def calls(part: str, everything: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what, call): those of a preset, or of odd shapes and all the rest."""

    def of(what: str, found: Iterator[Callable[[], None]]) -> Iterator[tuple[str, Callable[[], None]]]:
        for number, call in enumerate(found):
            yield f"{what} {number}", call

    for form in FORMATS:
        for dtype in DTYPES:
            make = Maker(dtype, form)
            usual = (dtype, form) == USUAL
            latents, features, images = (set(ODD),) * 3 if part == "odd" else shapes(part)
            if not (usual or everything):
                latents, features, images = (
                    found & set(SHORT) if part == "odd" and (dtype, form) in OTHERS else set()
                    for found in (latents, features, images)
                )
            pairs = (latent_operators, latents), (feature_operators, features), (image_operators, images)
            for operators, some in pairs:
                for shape in sorted(some):
                    yield from of(f"{operators.__name__} {shape} {dtype} {form}", operators(make, shape))
            if usual or everything or (part == "odd" and form == torch.contiguous_format):
                name = "mnist" if part == "odd" else part
                yield from of(f"weights of {name} {dtype} {form}", weight_operators(name, make))
    if part == "odd":
        yield from of("others", other_operators())


def main(part: str, everything: bool) -> dict[str, Any]:
    started, failures, done = time.time(), [], 0
    for what, call in calls(part, everything):
        done += 1
        try:
            call()
        except Exception as error:
            reason = driver.library.standin_refusal().decode()
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]} | {reason}")
    counts = driver.report()
    launches = {name: 0 for name, _ in jit_functions() if name.endswith("_kernel")}
    spills = dict(launches)
    for kernel in counts.pop("kernels"):
        launches[kernel["name"]] += kernel["launches"]
        spills[kernel["name"]] = max(spills[kernel["name"]], kernel["spills"])
    return {
        "part": part, "calls": done, "seconds": round(time.time() - started, 1), "failures": failures, **counts,
        "kernels": launches, "spills": spills, "waits": sorted(set(device.events)),
        "launchers": sorted(kernels.keys() - called),
    }  # fmt: skip


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], "all" in sys.argv)))
