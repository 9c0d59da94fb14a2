"""Random calls of every operator of ``torch.ops.nvae_fast``: valid arguments in many shapes, dtypes, strides and offsets, and
the same with something wrong about them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG_DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float16)
BATCHES = (0, 1, 1, 2, 3)
CHANNELS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33)
SIDES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17)
LARGE = ((47, 53), (1, 2100), (64, 33))  # more pixels than a task of the kernels has
ELEMENTS = 60_000


class Draw:
    """Random choices and tensors of one call."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def dtype(self) -> torch.dtype:
        return self.random.choice(FLOATS)

    def map_shape(self, channels: Sequence[int] = CHANNELS, sides: Sequence[int] = SIDES) -> tuple[int, ...]:
        if channels[-1] >= 17 and self.chance(0.1):
            # A task of several rows, of which a sample's last ones begin between two vectors and end close to the task's
            # 2048 elements: the last vector ends outside of them.
            return self.one((3, 4, 11, 31), (3, 5, 11, 31), (3, 5, 3, 227))
        b, c = self.one(*BATCHES), self.one(*channels)
        h, w = self.one(*LARGE) if self.chance(0.1) else (self.one(*sides), self.one(*sides))
        while b * c * h * w > ELEMENTS:
            b, c = max(b // 2, 1), min(c, max(channels[0], 1)) if b <= 1 else c
            if b == 1 and c * h * w > ELEMENTS:
                h = max(h // 2, 1)
        return b, c, h, w

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal values in a random layout."""
        return self.arranged((torch.randn(tuple(shape), generator=self.generator) * scale).to(dtype))

    def arranged(self, values: Tensor) -> Tensor:
        """``values`` in a random layout. Most are exactly as large as their memory, so that a sanitizer sees every access
        outside of it."""
        shape, dtype, kind = tuple(values.shape), values.dtype, self.random.random()
        if kind < 0.35 or not shape:
            return values
        if kind < 0.6 and len(shape) == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if kind < 0.7:  # other orders of dimensions
            order = self.random.sample(range(len(shape)), len(shape))
            inverse = [order.index(d) for d in range(len(shape))]
            return values.permute(order).contiguous().permute(inverse)
        if kind < 0.8:  # gaps
            wide = [n + self.one(0, 1, 3) for n in shape]
            out = torch.zeros(wide, dtype=dtype)[
                tuple(slice(w - n, w) for n, w in zip(shape, wide, strict=True))
            ]
            return out.copy_(values)
        if kind < 0.88:  # an offset that no vector is aligned to
            out = torch.zeros(values.numel() + 1, dtype=dtype)[1:].view(shape)
            return out.copy_(values)
        if kind < 0.94:  # every other element of the last dimension
            out = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
            return out.copy_(values)
        d = self.random.randrange(len(shape))  # one value along a dimension
        return values.narrow(d, 0, 1).expand(shape) if shape[d] else values

    def maybe(self, make: Callable[[], Any], share: float = 0.5) -> Any:
        return make() if self.chance(share) else None

    def like(self, t: Tensor, other_dtype: float = 0.15) -> Tensor:
        return self.tensor(t.shape, self.dtype() if self.chance(other_dtype) else t.dtype)

    def flags(self, n: int) -> list[bool]:
        return [self.chance(0.7) for _ in range(n)]

    def seed(self) -> Tensor:
        return torch.tensor(self.random.randrange(-(2**63), 2**63))


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------ operators


def _activation(d: Draw) -> str | None:
    return d.one(None, "swish", "elu")


def _squash(d: Draw) -> list[Any]:
    return [d.one(5.0, 5.0, None, 3.0), d.one(0.01, 0.0, 0.1)]


def _packed(d: Draw) -> Tensor:
    b, z, h, w = d.map_shape(CHANNELS[:12])
    return d.tensor((b, 2 * z, h, w), d.dtype())


def _noise(d: Draw, packed: Tensor) -> list[Any]:
    b, channels, h, w = packed.shape
    return [d.tensor((b, channels // 2, h, w), d.dtype()), None] if d.chance(0.4) else [None, d.seed()]


def residual_normal(d: Draw) -> list[Any]:
    posterior = _packed(d)
    prior = d.maybe(lambda: d.like(posterior), 0.7)
    return [posterior, prior, *_noise(d, posterior), d.chance(0.7), *_squash(d)]


def normal_sample(d: Draw) -> list[Any]:
    params = _packed(d)
    return [params, *_noise(d, params), d.one(1.0, 0.7, 0.0), *_squash(d)]


def normal_log_prob(d: Draw) -> list[Any]:
    z = d.tensor(d.map_shape(CHANNELS[:12]), d.dtype())
    b, c, h, w = z.shape
    dtype = d.dtype() if d.chance(0.2) and z.dtype is not torch.float64 else z.dtype
    dtype = z.dtype if dtype is torch.float64 else dtype
    return [z, d.maybe(lambda: d.tensor((b, 2 * c, h, w), dtype), 0.8), *_squash(d)]


def _per_channel(d: Draw, x: Tensor, n: int = 1) -> list[Tensor]:
    return [d.tensor((x.shape[1],), d.one(acc(x.dtype), acc(x.dtype), d.dtype())) for _ in range(n)]


def affine_activation(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    return [x, *_per_channel(d, x, 2), _activation(d)]


def affine_activation_reduce(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    pivot = d.maybe(lambda: _per_channel(d, x)[0])
    return [d.like(x), x, *_per_channel(d, x, 2), pivot, _activation(d), *d.flags(2)]


def affine_activation_grad(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    return [d.like(x), x, *_per_channel(d, x, 5), _activation(d)]


def _variance(d: Draw, x: Tensor) -> Tensor:
    return d.tensor((x.shape[1],), acc(x.dtype)).abs() + 0.1


def batch_norm_swish(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    given = [_per_channel(d, x)[0], _variance(d, x)] if d.chance(0.4) else [None, None]
    return [x, *_per_channel(d, x, 2), *given, 1e-3, _activation(d)]


def batch_norm_swish_backward(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    mean = d.tensor((x.shape[1],), acc(x.dtype), 0.1)
    return [d.like(x), x, *_per_channel(d, x, 2), mean, _variance(d, x), 1e-3, _activation(d), *d.flags(3)]


def channel_statistics(d: Draw) -> list[Any]:
    return [d.tensor(d.map_shape(), d.dtype()), d.chance(0.5)]


def elu(d: Draw) -> list[Any]:
    return [d.tensor(d.map_shape(), d.dtype())]


def plane_affine(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    b, c = x.shape[:2]

    def coefficients() -> Tensor:
        return d.tensor((d.one(b, 1), c), d.one(acc(x.dtype), d.dtype()))

    y = d.maybe(lambda: d.like(x), 0.7)
    return [x, coefficients(), y, None if y is None else d.maybe(coefficients), d.maybe(coefficients)]


def plane_affine_gradients(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    return [d.like(x), x, d.tensor((d.one(x.shape[0], 1), x.shape[1]), acc(x.dtype))]


def plane_dots(d: Draw) -> list[Any]:
    x = d.tensor(d.map_shape(), d.dtype())
    return [x, d.like(x), d.maybe(lambda: _per_channel(d, x)[0])]


def _gate(d: Draw) -> tuple[int, int, int, torch.dtype]:
    return d.one(*BATCHES), d.one(*CHANNELS), d.one(1, 2, 3, 4, 8, 9), d.one(torch.float32, torch.float64)


def batch_norm_coefficients(d: Draw) -> list[Any]:
    _, n, _, dtype = _gate(d)
    optional = [d.maybe(lambda: d.tensor((n,), dtype), 0.8) for _ in range(3)]
    return [optional[0], d.tensor((n,), dtype).abs() + 0.1, *optional[1:], 12.0, 1e-3]


def batch_norm_corrections(d: Draw) -> list[Any]:
    _, n, _, dtype = _gate(d)
    g, gx, rstd, scale = (d.tensor((n,), dtype) for _ in range(4))
    return [g, gx, d.maybe(lambda: d.tensor((n,), dtype)), rstd, scale, 12.0]


def merge_planes(d: Draw) -> list[Any]:
    b, n, _, dtype = _gate(d)
    return [d.tensor((b, n), dtype), d.tensor((b, n), dtype).abs(), d.one(1, 4, 9)]


def gate_coefficients(d: Draw) -> list[Any]:
    b, n, units, dtype = _gate(d)
    affine = [d.tensor((n,), dtype), d.tensor((n,), dtype)] if d.chance(0.5) else [None, None]
    layers = [d.tensor(s, dtype) for s in ((units, n), (units,), (n, units), (n,))]
    return [d.tensor((b, n), dtype), *affine, *layers, d.one(1.0, 0.1)]


def gate_gradients(d: Draw) -> list[Any]:
    b, n, units, dtype = _gate(d)
    sums = [d.tensor((b, n), dtype) for _ in range(2)]
    norm = [None] * 5
    if d.chance(0.5):
        norm = [d.tensor((b, n), dtype), *(d.tensor((n,), dtype) for _ in range(4))]
    hidden, gate = d.tensor((b, units), dtype).relu(), torch.sigmoid(d.tensor((b, n), dtype))
    return [
        *sums, *norm, d.tensor((b, n), dtype), hidden, gate, d.tensor((units, n), dtype), d.tensor((n, units), dtype),
        d.one(1.0, 0.1),
    ]  # fmt: skip


def _gated_map(d: Draw) -> tuple[Tensor, list[Tensor]]:
    x = d.tensor(d.map_shape(sides=SIDES[1:]), d.dtype())
    c, units, dtype = x.shape[1], d.one(1, 2, 4, 8), d.one(x.dtype, torch.float32)
    dtype = acc(x.dtype) if x.dtype is torch.float64 else dtype
    return x, [d.tensor(s, dtype) for s in ((units, c), (units,), (c, units), (c,))]


def squeeze_excite(d: Draw) -> list[Any]:
    x, layers = _gated_map(d)
    return [x, *layers, d.maybe(lambda: d.like(x)), d.one(1.0, 0.1)]


def squeeze_excite_gradients(d: Draw) -> list[Any]:
    x, layers = _gated_map(d)
    return [d.like(x), x, d.tensor(x.shape[:2], acc(x.dtype)), *layers, d.one(1.0, 0.1)]


def _convolution(d: Draw) -> tuple[Tensor, Tensor, int, int, int]:
    k = d.one(1, 3, 3, 5, 5, 7, 9, 11)
    x = d.tensor(d.map_shape(), d.dtype())
    upsample = d.one(1, 1, 2)
    weight = d.tensor((x.shape[1], 1, k, k), d.one(x.dtype, torch.float32, x.dtype), 0.3)
    return x, weight, 1 if upsample == 2 else d.one(1, 1, 2), d.one(1, 1, 2), upsample


def _taps(d: Draw, weight: Tensor) -> list[int] | None:
    k = weight.shape[2]
    return d.maybe(lambda: sorted(d.random.sample(range(k * k), d.one(*range(k * k + 1)))), 0.2)


def _affine(d: Draw, x: Tensor) -> list[Any]:
    return _per_channel(d, x, 2) if d.chance(0.5) else [None, None]


def depthwise_conv2d(d: Draw) -> list[Any]:
    x, weight, *geometry = _convolution(d)
    return [x, weight, *_affine(d, x), *geometry, _activation(d), d.chance(0.5), _taps(d, weight)]


def depthwise_conv2d_affine(d: Draw) -> list[Any]:
    x, weight, stride, _, upsample = _convolution(d)
    return [x, weight, *_per_channel(d, x, 2), stride, upsample, _activation(d), _activation(d)]


def depthwise_conv2d_backward(d: Draw) -> list[Any]:
    x, weight, stride, dilation, upsample = _convolution(d)
    size = [(n * upsample + stride - 1) // stride for n in x.shape[2:]]
    grad = d.tensor((*x.shape[:2], *size), x.dtype)
    with_out = d.chance(0.4)
    out = [d.like(grad), *_per_channel(d, x, 3)] if with_out else [None] * 4
    affine = _affine(d, x)
    needs = [*d.flags(2), affine[0] is not None and d.chance(0.7)]
    pivot = d.maybe(lambda: _per_channel(d, x)[0], 0.3)
    return [
        grad, *out, pivot, x, weight, *affine, stride, dilation, upsample, _activation(d), _taps(d, weight), *needs,
    ]  # fmt: skip


WINOGRAD_CHANNELS = *filter(None, CHANNELS), 63, 65


def _winograd(d: Draw) -> Tensor:
    sides = d.one(0, 4, 4, 8, 12), d.one(0, 4, 4, 8, 16)
    return d.tensor(
        (d.one(*BATCHES), d.one(*WINOGRAD_CHANNELS), *sides), d.one(torch.float32, torch.bfloat16)
    )


def _winograd_weight(d: Draw, c_in: int) -> Tensor:
    return d.tensor((d.one(*WINOGRAD_CHANNELS), c_in, 3, 3), d.dtype())


def winograd_weights(d: Draw) -> list[Any]:
    return [_winograd_weight(d, d.one(*WINOGRAD_CHANNELS))]


def winograd_conv2d(d: Draw) -> list[Any]:
    x = _winograd(d)
    weight = _winograd_weight(d, x.shape[1])
    points = d.tensor((36, *weight.shape[:2]), torch.float32)
    return [x, d.one(weight, points), d.maybe(lambda: d.tensor(weight.shape[:1], d.dtype()))]


def winograd_conv2d_backward(d: Draw) -> list[Any]:
    x = _winograd(d)
    weight = _winograd_weight(d, x.shape[1])
    grad = d.tensor((x.shape[0], weight.shape[0], *x.shape[2:]), d.one(x.dtype, torch.float32))
    return [grad, x, weight, *d.flags(3)]


def _weight(d: Draw, dtype: torch.dtype) -> list[Any]:
    k = d.one(1, 3, 5)
    shape = (d.one(1, 2, 3, 8, 17, 0), d.one(1, 2, 3, 8, 9), k, k)
    weight, norm = d.tensor(shape, dtype), d.tensor((shape[0], 1, 1, 1), dtype)
    return [weight, norm, d.maybe(lambda: (d.tensor(shape, dtype) > 0).to(dtype), 0.3)]


def weight_norm(d: Draw) -> list[Any]:
    return [*_weight(d, d.dtype()), 1e-5]


def _weights(d: Draw) -> list[list[Any]]:
    layers = [_weight(d, d.dtype()) for _ in range(d.one(1, 1, 2, 4))]
    return [list(column) for column in zip(*layers, strict=True)]


def weight_norm_many(d: Draw) -> list[Any]:
    return [*_weights(d), 1e-5, d.one(None, torch.float32, torch.bfloat16, torch.float64)]


def weight_norm_many_backward(d: Draw) -> list[Any]:
    weights = _weights(d)
    return [[d.like(w) for w in weights[0]], *weights, 1e-5, *d.flags(2)]


def _mixtures(d: Draw) -> tuple[Tensor, int]:
    m = d.one(1, 2, 3, 5, 10)
    b, _, h, w = d.map_shape((1,), SIDES[:11])
    return d.tensor((b, 10 * m, h, w), d.dtype()), m


def mixture_logistic_log_prob(d: Draw) -> list[Any]:
    params, m = _mixtures(d)
    b, _, h, w = params.shape
    bits = d.one(8, 8, 5)
    levels = 2**bits - 1
    x = torch.randint(levels + 1, (b, 3, h, w), generator=d.generator) / levels * 2 - 1
    return [params, d.arranged(x.to(acc(params.dtype))), m, bits]


def mixture_logistic_sample(d: Draw) -> list[Any]:
    params, m = _mixtures(d)
    return [params, d.seed(), m, d.one(1.0, 0.7)]


def mixture_logistic_mean(d: Draw) -> list[Any]:
    return list(_mixtures(d))


def philox_normal(d: Draw) -> list[Any]:
    shape = d.map_shape() if d.chance(0.7) else tuple(d.one(*SIDES) for _ in range(d.one(0, 1, 2, 3)))
    return [list(shape), d.seed(), d.dtype(), len(shape) == 4 and d.chance(0.5)]


def philox_words(d: Draw) -> list[Any]:
    return [d.seed(), d.one(0, 1, 3, 17, 200), d.one(0, 5, 2**32 - 3, 2**40)]


def split_seed(d: Draw) -> list[Any]:
    return [d.seed(), d.one(0, 1, 2, 17)]


def _spectral(d: Draw) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    dtype, weights, u, v = d.one(torch.float32, torch.float64), [], [], []
    for _ in range(d.one(1, 2, 3)):
        n, k = d.one(1, 2, 3), d.one(1, 3)
        shape = (d.one(1, 3, 8, 17), d.one(1, 2, 9), k, k)
        weights += [d.tensor(shape, dtype) for _ in range(n)]
        vectors = [torch.randn(n, m, generator=d.generator).to(dtype) for m in (shape[0], shape[1] * k * k)]
        u.append(vectors[0] / vectors[0].norm(dim=1, keepdim=True))
        v.append(vectors[1] / vectors[1].norm(dim=1, keepdim=True))
    return weights, u, v


def spectral_lengths(d: Draw) -> list[Any]:
    weights, u, _ = _spectral(d)
    return [weights, u, d.one(1, 2, 4), 1e-12]


def spectral_gradients(d: Draw) -> list[Any]:
    weights, u, v = _spectral(d)
    return [torch.randn((), generator=d.generator).to(u[0].dtype), weights, u, v]


def adamax(d: Draw) -> list[Any]:
    lists: list[list[Tensor]] = [[], [], [], []]
    for _ in range(d.one(1, 2, 4)):
        shape = (d.one(1, 3, 17), d.one(1, 9, 100), d.one(1, 3), d.one(1, 3))
        channels_last = d.chance(0.4)
        for i, values in enumerate(lists):
            t = torch.randn(shape, generator=d.generator)
            t = t.abs() if i == 3 else t
            values.append(t.contiguous(memory_format=torch.channels_last) if channels_last else t)
    return [*lists, 1e-3, 0.9, 0.999, 1e-3, d.one(0.0, 0.1)]


# <name>_backward of operators whose backward is derived (nvae_fast/ops/_op.py): outputs, and arguments to differentiate.
DERIVED = {
    "residual_normal": (residual_normal, 4, 3),
    "normal_sample": (normal_sample, 1, 2),
    "normal_log_prob": (normal_log_prob, 1, 2),
    "elu": (elu, 1, 1),
    "weight_norm": (weight_norm, 1, 2),
    "mixture_logistic_log_prob": (mixture_logistic_log_prob, 1, 1),
}


def derived_backward(d: Draw, name: str, formula: Callable[..., Any]) -> list[Any]:
    make, outputs, where = DERIVED[name]
    args = make(d)
    results = formula(*args)
    results = results if isinstance(results, tuple) else (results,)
    grads: list[Any] = [d.tensor(r.shape, r.dtype) for r in results]
    if outputs > 1:
        grads = [g if d.chance(0.8) else None for g in grads]
    return [*grads, *args, *(d.flags(where) if where > 1 else [])]


# ------------------------------------------------------------------------------------- wrong arguments


def wrong_tensor(d: Draw, t: Tensor) -> Tensor:
    """``t`` with another shape or dtype."""
    kind = d.one(
        "grow", "shrink", "zero", "unsqueeze", "drop", "flat", "transpose", "scalar", "dtype", "dtype"
    )
    shape = list(t.shape)
    if kind == "dtype":
        return t.to(d.one(*WRONG_DTYPES))
    if kind == "scalar" or not shape:
        return torch.randn((), generator=d.generator).to(t.dtype)
    axis = d.random.randrange(len(shape))
    if kind == "flat":
        return t.reshape(-1)
    if kind == "unsqueeze":
        return t.unsqueeze(axis)
    if kind == "transpose":
        return t.transpose(axis, -1)
    if kind == "drop":
        return t.select(axis, 0) if shape[axis] else t.reshape(-1)
    shape[axis] = {"grow": shape[axis] + d.one(1, 3), "shrink": max(shape[axis] - 1, 0), "zero": 0}[kind]
    # Exactly as much memory: an access by the right shape is one outside of it.
    return torch.randn(shape, generator=d.generator).to(t.dtype)


def wrong_value(d: Draw, value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if d.chance(0.05) else wrong_tensor(d, value)
    if value is None:
        return d.one(
            lambda: torch.randn(d.one((), (3,), (2, 3), (2, 4, 3, 3)), generator=d.generator),
            lambda: "relu",
            lambda: [0],
        )()
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return d.one("relu", "", "swish\0")
    if isinstance(value, int):
        return d.one(0, -1, 3, value + 1, 2**62, -(2**63))
    if isinstance(value, float):
        return d.one(0.0, -1.0, math.nan, math.inf)
    if isinstance(value, torch.dtype):
        return d.one(*WRONG_DTYPES)
    assert isinstance(value, list)
    if not value:
        return [3]
    changed, i = list(value), d.random.randrange(len(value))
    kind = d.one("drop", "repeat", "empty", "entry", "entry", "entry")
    if kind == "drop":
        del changed[i]
    elif kind == "repeat":
        changed.append(changed[i])
    elif kind == "empty":
        changed = []
    else:
        changed[i] = wrong_value(d, changed[i])
    return changed
