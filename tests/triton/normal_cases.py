"""Calls of the Triton kernels of the normal distributions: arguments, and results of any implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import strided

from nvae_fast.ops.philox import philox_normal

FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
SEED = 2**40 + 12345


@dataclass(frozen=True)
class Case:
    """One call of an op and of its backward pass."""

    op: str
    size: tuple[int, int, int, int] = (2, 3, 4, 4)
    layout: str = "channels"
    dtype: torch.dtype = torch.float32
    prior: bool = True  # of normal_log_prob: params
    residual: bool = True
    noise: bool = False  # given, else drawn from SEED
    clamp: float | None = 5.0
    floor: float = 0.01
    temperature: float = 0.7
    upstream: tuple[int, ...] = (0, 1, 2, 3)  # outputs that have a gradient
    wanted: tuple[int, ...] = (0, 1, 2)  # inputs that need one
    spread: float = 1.0
    change: str = ""  # of the inputs, see changed()
    choices: tuple[tuple[str, Any], ...] = ()  # launch choices to use instead
    tolerance: float = 4.0  # in units of what the reference loses in the dtype

    @property
    def name(self) -> str:
        default = Case(self.op)
        changes = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k) and k != "op"]
        return f"{self.op}: " + ", ".join(changes)


BOTH = ("rows", "channels")
HALF = (torch.bfloat16, torch.float16)
TWO_TILES = (("SUM_TILES", ((0, 2),)),)
WIDE = (("_INT32_LIMIT", 0),)
# As if the map were large: 16 elements a thread, and several chunks of pixels where SUM_TILES says so.
LARGE = (("MULTIPROCESSORS", 1),)


def cases() -> list[Case]:
    rn, ns, lp = Case("residual_normal"), Case("normal_sample"), Case("normal_log_prob")
    found = [
        *(replace(rn, layout=layout, noise=noise) for layout in BOTH for noise in (True, False)),
        replace(rn, size=(2, 20, 8, 8), residual=False),
        replace(rn, size=(2, 20, 8, 8), layout="rows", residual=False, noise=True),
        *(replace(rn, size=(1, 20, 4, 4), layout=layout, dtype=dtype) for layout in BOTH for dtype in HALF),
        *(replace(rn, size=(3, 33, 1, 1), noise=noise) for noise in (True, False)),
        *(replace(rn, size=(2, 1, 13, 1), layout=layout, prior=False) for layout in BOTH),
        *(replace(rn, size=(2, 5, 7, 9), layout=layout) for layout in BOTH),
        replace(rn, size=(1, 33, 13, 1)),
        replace(rn, size=(2, 6, 4, 6), prior=False, dtype=torch.float16, noise=True),
        replace(rn, size=(1, 2, 64, 64), layout="rows"),
        *(replace(rn, size=(1, 4, 32, 36), layout=layout, choices=TWO_TILES) for layout in BOTH),
        *(replace(rn, size=(5, 20, 8, 8), layout=layout, choices=LARGE) for layout in BOTH),
        replace(rn, size=(2, 20, 16, 12), dtype=torch.bfloat16, choices=LARGE + TWO_TILES),
        replace(rn, size=(3, 66, 4, 4), prior=False, choices=LARGE),
        *(replace(rn, layout=layout, choices=WIDE) for layout in BOTH),
        # More samples than one axis of a grid other than the first may have, in a few large programs.
        replace(
            rn,
            size=(65_537, 1, 1, 1),
            noise=True,
            choices=(("LANES", (2**15,)), ("MOST_ELEMENTS", 2**15)),
        ),
        # Clamps: none, so far out that exponentials are large, and out of the range of folded coefficients. Where the
        # KL is all but zero its digits cancel.
        *(replace(rn, clamp=None, floor=0.0, layout=layout) for layout in BOTH),
        *(replace(rn, clamp=clamp, floor=0.3, noise=True) for clamp in (30.0, 200.0)),
        replace(rn, clamp=0.005, floor=0.3, noise=True, tolerance=20),
        *(replace(rn, change=change, layout=layout) for change in ("strided", "slices") for layout in BOTH),
        replace(rn, change="prior otherwise"),
        # Far out the soft clamp is good to 5e-6, and nothing but the clamp from 7.5 times the clamp on.
        replace(rn, size=(1, 4, 8, 8), spread=30.0, noise=True, tolerance=200),
        replace(rn, size=(1, 4, 8, 8), spread=1e6, noise=True),
        replace(rn, spread=1e-30, noise=True),
        # Gradients of some outputs, for some inputs.
        *(replace(rn, upstream=u, noise=len(u) == 1) for u in ((0,), (1,), (2,), (3,), (0, 1), (1, 2, 3))),
        *(replace(rn, wanted=w, noise=True, change="expanded gradient") for w in ((0,), (1,), (2,))),
    ]
    for op in (ns, lp):
        found += [
            *(replace(op, layout=layout, noise=layout == "rows") for layout in BOTH),
            *(
                replace(op, size=(1, 20, 4, 4), layout=layout, dtype=dtype)
                for layout, dtype in zip(BOTH, HALF, strict=True)
            ),
            *(replace(op, size=(2, 5, 7, 9), layout=layout, noise=layout == "rows") for layout in BOTH),
            *(replace(op, size=(2, 1, 13, 1), layout=layout) for layout in BOTH),
            replace(op, size=(3, 33, 1, 1)),
            replace(op, clamp=None, floor=0.0),
            *(replace(op, change="strided", layout=layout) for layout in BOTH),
            replace(op, choices=WIDE),
            *(replace(op, wanted=(w,), noise=True) for w in (0, 1)),
        ]
    found += [replace(ns, temperature=0.0), replace(ns, size=(2, 4, 4, 6), temperature=2.0, layout="rows")]
    found += [replace(lp, prior=False, layout=layout) for layout in BOTH]
    found += [replace(lp, size=(1, 4, 32, 36), layout=layout, choices=TWO_TILES) for layout in BOTH]
    found += [replace(lp, size=(5, 20, 8, 8), choices=LARGE), replace(ns, size=(5, 20, 8, 8), choices=LARGE)]
    found += [replace(lp, size=(1, 2, 64, 64), layout="rows"), replace(lp, change="expanded gradient")]
    return found


def changed(case: Case, position: int, t: torch.Tensor) -> torch.Tensor:
    """The same values laid out otherwise."""
    if case.change == "strided":
        return strided(t)
    if case.change == "slices":  # of a tensor with more channels and samples
        b, c, h, w = t.shape
        whole = torch.full((b + 1, c + 3, h, w), float("nan"), dtype=t.dtype)
        whole = whole.contiguous(memory_format=FORMATS[case.layout])
        whole[1:, 2:-1] = t
        return whole[1:, 2:-1]
    if case.change == "prior otherwise" and position == 1:
        return t.contiguous()
    return t


def inputs(case: Case) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Tensors of the op (posterior, prior, noise | params, noise | z, params), and gradients of its outputs."""
    generator = torch.Generator().manual_seed(len(case.name))
    b, z, h, w = case.size

    def draw(channels: int, spread: float = 1.0) -> torch.Tensor:
        values = torch.randn((b, channels, h, w), generator=generator) * spread
        return values.to(case.dtype).contiguous(memory_format=FORMATS[case.layout])

    packed = [draw(2 * z, case.spread), draw(2 * z, case.spread)]
    one = [draw(z), draw(z)]
    sums = [torch.randn((b, z), generator=generator) for _ in range(3)]
    if case.change == "expanded gradient":
        sums = [s[:1, :1].expand(b, z) for s in sums]
    if case.op == "residual_normal":
        tensors = [packed[0], packed[1] if case.prior else None, one[0] if case.noise else None]
        grads: list[torch.Tensor | None] = [one[1], *sums]
    elif case.op == "normal_sample":
        tensors, grads = [packed[0], one[0] if case.noise else None], [one[1]]
    else:
        tensors, grads = [one[0], packed[0] if case.prior else None], [sums[0]]
    grads = [g if i in case.upstream else None for i, g in enumerate(grads)]
    return [None if t is None else changed(case, i, t) for i, t in enumerate(tensors)], grads


OPS = ("residual_normal", "normal_sample", "normal_log_prob")
OPERATORS = {f"{op}{end}" for op in OPS for end in ("", "_backward")}


def arguments(case: Case, dtype: torch.dtype | None, noise: bool) -> tuple[list[Any], list[Any]]:
    """Arguments of the operator and of its backward operator; with ``noise`` the draws of the seed are given."""
    tensors, grads = inputs(case)
    if noise and case.op != "normal_log_prob" and tensors[-1] is None:
        tensors[-1] = philox_normal(case.size, SEED, memory_format=FORMATS[case.layout])
    if dtype is not None:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
        grads = [None if g is None else g.to(dtype) for g in grads]
    args: list[Any] = list(tensors)
    if case.op != "normal_log_prob":
        args.append(torch.tensor(SEED) if tensors[-1] is None else None)
    args += [case.residual] if case.op == "residual_normal" else []
    args += [case.temperature] if case.op == "normal_sample" else []
    args += [case.clamp, case.floor]
    need = [i in case.wanted for i in range(3 if case.op == "residual_normal" else 2)]
    if case.op != "normal_log_prob" and not case.noise:
        need[-1] = False
    return args, [*grads, *args, *need]


def compute(
    case: Case, forward: Any, backward: Any, dtype: torch.dtype | None = None, noise: bool = False
) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    args, backward_args = arguments(case, dtype, noise)
    outputs = forward(*args)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    return {**found, **{f"gradient {i}": t for i, t in enumerate(backward(*backward_args)) if t.dim() == 4}}
