"""weight_norm of all layers in one launch, in Triton; formulas are the docstrings of nvae_fast/ops/weight_norm.py.

A program owns a few rows (output channels) of one layer, which it finds in a table. It reads them twice, the second time
from the cache, and writes them once. Arithmetic is float32; two runs are equal bit for bit.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

# A tile, 8 elements a thread. Predicted: rows of 20 to 2304 elements, nearly all bytes in those of some hundred.
ROWS, COLUMNS, WARPS = 4, 256, 4
TABLES = 64  # tables of addresses that are kept
WRITTEN = 32  # numbers that a launch of write_kernel brings
_OFFSET = 2**62  # makes any number, and any address, one that Triton passes as 64 bits
_OPTIONS = {"enable_fp_fusion": True, "num_warps": WARPS}
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
        # The norm's slope at zero is taken as zero, as PyTorch does.
        back = tl.where(norm > 0.0, along * inverse / norm, 0.0)
        for start in range(0, columns, COLUMNS):
            inside = exists & (start + column < columns)
            at = row * columns + start + column
            v, m = _value(weight, mask, at, inside, TYPE, HAS_MASK)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_weight + at, ((scale * g - back * v) * m).to(TYPE), mask=inside)


@triton.jit(do_not_specialize=[f"v{i}" for i in range(32)])
def write_kernel(
    table, OFFSET: tl.constexpr,
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15,
    v16, v17, v18, v19, v20, v21, v22, v23, v24, v25, v26, v27, v28, v29, v30, v31,
):  # fmt: skip
    """32 numbers, each larger by OFFSET than what is stored."""
    tl.store(table, v0 - OFFSET)
    tl.store(table + 1, v1 - OFFSET)
    tl.store(table + 2, v2 - OFFSET)
    tl.store(table + 3, v3 - OFFSET)
    tl.store(table + 4, v4 - OFFSET)
    tl.store(table + 5, v5 - OFFSET)
    tl.store(table + 6, v6 - OFFSET)
    tl.store(table + 7, v7 - OFFSET)
    tl.store(table + 8, v8 - OFFSET)
    tl.store(table + 9, v9 - OFFSET)
    tl.store(table + 10, v10 - OFFSET)
    tl.store(table + 11, v11 - OFFSET)
    tl.store(table + 12, v12 - OFFSET)
    tl.store(table + 13, v13 - OFFSET)
    tl.store(table + 14, v14 - OFFSET)
    tl.store(table + 15, v15 - OFFSET)
    tl.store(table + 16, v16 - OFFSET)
    tl.store(table + 17, v17 - OFFSET)
    tl.store(table + 18, v18 - OFFSET)
    tl.store(table + 19, v19 - OFFSET)
    tl.store(table + 20, v20 - OFFSET)
    tl.store(table + 21, v21 - OFFSET)
    tl.store(table + 22, v22 - OFFSET)
    tl.store(table + 23, v23 - OFFSET)
    tl.store(table + 24, v24 - OFFSET)
    tl.store(table + 25, v25 - OFFSET)
    tl.store(table + 26, v26 - OFFSET)
    tl.store(table + 27, v27 - OFFSET)
    tl.store(table + 28, v28 - OFFSET)
    tl.store(table + 29, v29 - OFFSET)
    tl.store(table + 30, v30 - OFFSET)
    tl.store(table + 31, v31 - OFFSET)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_tables: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()


def _table(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``numbers`` on the device. Weights, and mostly results too, stand where they stood in the last step: then nothing is
    copied. A graph under capture, which can neither copy from the host nor rely on what others may drop, writes its own."""
    if _capturing(device):
        return written(numbers, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, numbers)
    found = _tables.get(key)
    if found is None:
        found = _tables[key] = torch.tensor(numbers, dtype=torch.int64).to(device)
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    return found


def written(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """``numbers`` brought to the device as arguments of kernels."""
    padded = -(-len(numbers) // WRITTEN) * WRITTEN
    table = torch.empty(padded, dtype=torch.int64, device=device)
    values = [n + _OFFSET for n in numbers] + [_OFFSET] * (padded - len(numbers))
    with _on(device):
        for i in range(0, padded, WRITTEN):
            write_kernel[(1,)](table[i:], _OFFSET, *values[i : i + WRITTEN], num_warps=1)
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
        sizes, blocks, programs = _plan(tuple(layers[i].shape for i in chosen))
        if not programs:
            continue
        device = layers[0].weight.device
        pointers = tuple(0 if t is None else t.data_ptr() for i in chosen for t in addresses[i])
        tables = [_table(numbers, device) for numbers in (pointers, sizes, blocks)]
        with _on(device):
            kernel[(programs,)](  # type: ignore[index]
                *tables, float(eps), TYPE=_TYPES[kind[0]], OUT=_TYPES[kind[1]],
                HAS_MASK=any(layers[i].mask is not None for i in chosen), ROWS=ROWS, COLUMNS=COLUMNS,
                **constants, **_OPTIONS,
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
