"""weight_norm of all layers in one launch, in Triton; formulas are the docstrings of nvae_fast/ops/weight_norm.py.

A program owns a few rows (output channels) of one layer, which it finds in a table. It reads them twice, the second time
from the cache, and writes them once. Arithmetic is float32; two runs are equal bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.launch import launch
from nvae_fast.ops import _capture

# A tile, 8 elements a thread. Predicted: rows of 20 to 2304 elements, nearly all bytes in those of some hundred.
ROWS, COLUMNS, WARPS = 4, 256, 4
TABLES = 64  # tables of addresses that are kept
WRITTEN = 480  # numbers that a launch of write_kernel brings; the arguments of a kernel fill 4 KB at most
_OFFSET = 2**62
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _rows(blocks, sizes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's layer, the layer's columns, and its tile: row (ROWS, 1), whether it exists, column (1, COLUMNS)."""
    pid = tl.program_id(0)
    layer = tl.load(blocks + 2 * pid)
    row = tl.load(blocks + 2 * pid + 1) + tl.arange(0, ROWS)[:, None]
    return (
        layer,
        tl.load(sizes + 2 * layer + 1),
        row,
        row < tl.load(sizes + 2 * layer),
        tl.arange(0, COLUMNS)[None, :],
    )


@triton.jit
def _value(weight, mask, at, inside, TYPE: tl.constexpr, HAS_MASK: tl.constexpr):
    """The masked weight, and the mask, whose address is 0 for a layer without one."""
    v = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.full(v.shape, 1.0, tl.float32)
    if HAS_MASK:
        there = inside & (mask + tl.zeros_like(at) != 0)
        m = tl.load(mask.to(tl.pointer_type(TYPE)) + at, mask=there, other=1.0).to(tl.float32)
        v = v * m
    return v, m


@triton.jit
def forward_kernel(
    addresses, sizes, blocks, eps,
    TYPE: tl.constexpr, OUT: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``addresses`` (layers, 4): weight, log norm, mask, result. ``sizes`` (layers, 2): rows, columns. ``blocks`` (programs,
    2): layer, first row."""
    layer, columns, row, exists, column = _rows(blocks, sizes, ROWS, COLUMNS)
    place = addresses + 4 * layer
    weight = tl.load(place).to(tl.pointer_type(TYPE))
    log_norm = tl.load(place + 1).to(tl.pointer_type(TYPE))
    mask = tl.load(place + 2)
    out = tl.load(place + 3).to(tl.pointer_type(OUT))
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = exists & (start + column < columns)
        v, _ = _value(weight, mask, row * columns + start + column, inside, TYPE, HAS_MASK)
        squares += v * v
    norm = tl.sqrt_rn(tl.sum(squares, 1))[:, None]
    scale = tl.exp(tl.load(log_norm + row, mask=exists, other=0.0).to(tl.float32)) / (norm + eps)
    for start in range(0, columns, COLUMNS):
        inside = exists & (start + column < columns)
        at = row * columns + start + column
        v, _ = _value(weight, mask, at, inside, TYPE, HAS_MASK)
        tl.store(out + at, (v * scale).to(OUT), mask=inside)


@triton.jit
def backward_kernel(
    addresses, sizes, blocks, eps,
    TYPE: tl.constexpr, OUT: tl.constexpr, HAS_MASK: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_LOG_NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``addresses`` (layers, 6): weight, log norm, mask, upstream gradient, gradients of weight and log norm."""
    layer, columns, row, exists, column = _rows(blocks, sizes, ROWS, COLUMNS)
    place = addresses + 6 * layer
    weight = tl.load(place).to(tl.pointer_type(TYPE))
    log_norm = tl.load(place + 1).to(tl.pointer_type(TYPE))
    mask = tl.load(place + 2)
    grad = tl.load(place + 3).to(tl.pointer_type(OUT))
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    dots = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = exists & (start + column < columns)
        at = row * columns + start + column
        v, _ = _value(weight, mask, at, inside, TYPE, HAS_MASK)
        squares += v * v
        dots += v * tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(squares, 1))[:, None]
    inverse = 1.0 / (norm + eps)
    scale = tl.exp(tl.load(log_norm + row, mask=exists, other=0.0).to(tl.float32)) * inverse
    along = tl.sum(dots, 1)[:, None] * scale
    if NEED_LOG_NORM:
        to_norm = tl.load(place + 5).to(tl.pointer_type(TYPE))
        tl.store(to_norm + row, along.to(TYPE), mask=exists)
    if NEED_WEIGHT:
        to_weight = tl.load(place + 4).to(tl.pointer_type(TYPE))
        # The norm's derivative at zero is taken as zero, as PyTorch does.
        back = tl.where(norm > 0.0, along * inverse / norm, 0.0)
        for start in range(0, columns, COLUMNS):
            inside = exists & (start + column < columns)
            at = row * columns + start + column
            v, m = _value(weight, mask, at, inside, TYPE, HAS_MASK)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_weight + at, ((scale * g - back * v) * m).to(TYPE), mask=inside)


@triton.jit
def write_kernel(table, values, OFFSET: tl.constexpr):
    """Stores (value - OFFSET - 1) / 2 of each value, see ``_encoded``."""
    for i in tl.static_range(len(values)):
        tl.store(table + i, (values[i] - OFFSET) >> 1)


_addresses: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
# By device and shapes of the layers. Never dropped, because a graph that anybody captured may read them.
_plans: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
_loaded: set[torch.device] = set()  # where a graph under capture may launch write_kernel


def _address_table(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``numbers`` on the device. Weights, and mostly results too, have the addresses of the last step: then nothing is
    copied. In a graph they are a constant that its owner fills, or without an owner are written in every replay."""
    constant = _capture.table(numbers, device)
    if _capture.capturing(device):
        return written(numbers, device) if constant is None else constant
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, numbers)
    found = _addresses.get(key)
    if found is None:
        found = _addresses[key] = _copied(numbers, device)
        if len(_addresses) > TABLES:
            _addresses.popitem(last=False)
    else:
        _addresses.move_to_end(key)
    return found


def _plan_tables(
    shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of :func:`_plan` on the device."""
    key = (device, shapes)
    found = _plans.get(key)
    if found is None:
        sizes, blocks, _ = _plan(shapes)
        if _capture.capturing(device):  # without a rehearsal
            return written(sizes, device), written(blocks, device)
        found = _plans[key] = _copied(sizes, device), _copied(blocks, device)
    return found


def _copied(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and device not in _loaded:
        _loaded.add(device)
        written((0,), device)
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def _encoded(number: int) -> int:
    """What Triton always passes as 64 bits and never specialises on, neither on 1 nor on multiples of 16: one kernel writes
    any numbers, and none is first loaded during a capture."""
    return 2 * number + 1 + _OFFSET


def written(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """``numbers`` brought to the device as arguments of kernels."""
    padded = -(-len(numbers) // WRITTEN) * WRITTEN
    table = torch.empty(padded, dtype=torch.int64, device=device)
    values = [_encoded(n) for n in (*numbers, *[0] * (padded - len(numbers)))]
    for i in range(0, padded, WRITTEN):
        launch(write_kernel, 1, device, table[i:], tuple(values[i : i + WRITTEN]), _OFFSET, warps=1)
    return table


@lru_cache(maxsize=256)
def _plan(shapes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes of the layers, and layer and first row of every program."""
    blocks = [(i, row) for i, (rows, columns) in enumerate(shapes) if columns for row in range(0, rows, ROWS)]
    return (
        tuple(n for shape in shapes for n in shape),
        tuple(n for block in blocks for n in block),
        len(blocks),
    )


def _strides(t: torch.Tensor, channels_last: bool) -> tuple[int, ...]:
    _, c, h, w = t.shape
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def _dense(t: torch.Tensor, channels_last: bool) -> bool:
    """Whether the numbers stand in that order; dimensions of one element do not matter."""
    expected = _strides(t, channels_last)
    return all(n == 1 or s == e for n, s, e in zip(t.shape, t.stride(), expected, strict=True))


def _ordered(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if _dense(t, channels_last):
        return t
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class _Layer:
    """A layer's inputs in one order, and its results."""

    def __init__(
        self, weight: torch.Tensor, log_norm: torch.Tensor, mask: torch.Tensor | None, out: torch.dtype
    ) -> None:
        if weight.dtype not in _TYPES or out not in _TYPES:
            raise TypeError(
                f"weight_norm: the GPU kernel computes in float32; expected one of {tuple(_TYPES)},"
                f" got {weight.dtype} and {out}"
            )
        self.channels_last = not _dense(weight, False) and _dense(weight, True)
        self.like, self.out = weight, out
        self.weight = _ordered(weight, self.channels_last)
        self.log_norm = log_norm.to(weight.dtype).contiguous()
        self.mask = None if mask is None else _ordered(mask.to(weight.dtype), self.channels_last)
        self.shape = (weight.shape[0], weight[0].numel() if weight.shape[0] else 0)

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        """As the weight, or where its strides are of another kind a dense tensor that :meth:`result` copies."""
        empty = torch.empty_like(self.like, dtype=dtype)
        return empty if _dense(empty, self.channels_last) else torch.empty_like(self.weight, dtype=dtype)

    def result(self, t: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_like(self.like, dtype=t.dtype)
        return t if empty.stride() == t.stride() else empty.copy_(t)

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype]:
        return self.weight.dtype, self.out


def _launch(kernel: object, layers: Sequence[_Layer], addresses: Sequence[tuple[torch.Tensor | None, ...]], eps: float,
            **constants: bool) -> None:  # fmt: skip
    """One launch for each combination of dtypes, of which there is mostly one."""
    for kind in dict.fromkeys(layer.kind for layer in layers):
        chosen = [i for i, layer in enumerate(layers) if layer.kind == kind]
        shapes = tuple(layers[i].shape for i in chosen)
        _, _, programs = _plan(shapes)
        if not programs:
            continue
        device = layers[0].weight.device
        pointers = tuple(0 if t is None else t.data_ptr() for i in chosen for t in addresses[i])
        tables = _address_table(pointers, device), *_plan_tables(shapes, device)
        launch(
            kernel, programs, device, *tables, float(eps), warps=WARPS, TYPE=_TYPES[kind[0]], OUT=_TYPES[kind[1]],
            HAS_MASK=any(layers[i].mask is not None for i in chosen), ROWS=ROWS, COLUMNS=COLUMNS, **constants,
        )  # fmt: skip


def weight_norm(
    weights: Sequence[torch.Tensor],
    log_norms: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """The normalised weights."""
    layers = [_Layer(w, g, m, dtype or w.dtype) for w, g, m in zip(weights, log_norms, masks, strict=True)]
    outputs = [layer.empty(layer.out) for layer in layers]
    rows = [(x.weight, x.log_norm, x.mask, out) for x, out in zip(layers, outputs, strict=True)]
    _launch(forward_kernel, layers, rows, eps)
    return [layer.result(out) for layer, out in zip(layers, outputs, strict=True)]


def weight_norm_backward(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    log_norms: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    eps: float,
    need_weights: bool,
    need_log_norms: bool,
) -> list[torch.Tensor]:
    """Gradients of the weights where they are wanted, then of the log norms where they are wanted."""
    layers = [_Layer(w, g, m, d.dtype) for w, g, m, d in zip(weights, log_norms, masks, grads, strict=True)]
    given = [_ordered(d, layer.channels_last) for d, layer in zip(grads, layers, strict=True)]
    of_weights = [layer.empty(layer.weight.dtype) if need_weights else None for layer in layers]
    of_norms = [
        layer.log_norm.new_zeros(layer.log_norm.shape)
        if not layer.shape[1]
        else layer.log_norm.new_empty(layer.log_norm.shape)
        for layer in (layers if need_log_norms else ())
    ]
    rows = [
        (x.weight, x.log_norm, x.mask, d, to_weight, to_norm)
        for x, d, to_weight, to_norm in zip(
            layers, given, of_weights, of_norms or [None] * len(layers), strict=True
        )
    ]
    _launch(backward_kernel, layers, rows, eps, NEED_WEIGHT=need_weights, NEED_LOG_NORM=need_log_norms)
    found = [layer.result(t) for layer, t in zip(layers, of_weights, strict=True) if t is not None]
    return found + [t.to(g.dtype) for t, g in zip(of_norms, log_norms, strict=False)]
