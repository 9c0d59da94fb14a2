"""The Triton kernels of the normal distributions, run in Triton's interpreter against the reference in float64.

The interpreter must be chosen before triton is imported, so the kernels run in a process of their own: this file, started
with a group of cases and the file to write to.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from harness import relative_error, strided

import nvae_fast as nf
from nvae_fast.ops._op import DEFINITIONS
from nvae_fast.ops.philox import philox_normal

ROOT = Path(__file__).resolve().parent.parent
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


def cases(group: str) -> list[Case]:
    rn, ns, lp = Case("residual_normal"), Case("normal_sample"), Case("normal_log_prob")
    if group == "residual_normal":
        return [
            *(replace(rn, layout=layout, noise=noise) for layout in BOTH for noise in (True, False)),
            replace(rn, size=(2, 20, 8, 8), residual=False),
            replace(rn, size=(2, 20, 8, 8), layout="rows", residual=False, noise=True),
            *(
                replace(rn, size=(1, 20, 4, 4), layout=layout, dtype=dtype)
                for layout in BOTH
                for dtype in HALF
            ),
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
            *(
                replace(rn, change=change, layout=layout)
                for change in ("strided", "slices")
                for layout in BOTH
            ),
            replace(rn, change="prior otherwise"),
            # Far out the soft clamp is good to 5e-6, and nothing but the clamp from 7.5 times the clamp on.
            replace(rn, size=(1, 4, 8, 8), spread=30.0, noise=True, tolerance=200),
            replace(rn, size=(1, 4, 8, 8), spread=1e6, noise=True),
            replace(rn, spread=1e-30, noise=True),
            # Gradients of some outputs, for some inputs.
            *(
                replace(rn, upstream=u, noise=len(u) == 1)
                for u in ((0,), (1,), (2,), (3,), (0, 1), (1, 2, 3))
            ),
            *(replace(rn, wanted=w, noise=True, change="expanded gradient") for w in ((0,), (1,), (2,))),
        ]
    found = []
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


def layout_of(t: torch.Tensor) -> str:
    strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    return f"{t.dtype} {tuple(t.shape)} {strides}"


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The interpreter multiplies and rounds; a processor's fma does not round in between, and the kernels rely on it."""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return type(x)(exact.astype(x.data.dtype), x.dtype)


HARD = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 88.0, float("inf"), -float("inf"), float("nan")])
HARD_SETTINGS = {"clamped": (5.0, 0.01), "free": (None, 0.0)}


def hard(clamp: float | None, functions: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and gradients at every pair of extreme values for posterior and prior, a pair to a sample."""
    grid = HARD[torch.tensor(list(itertools.product(range(len(HARD)), repeat=2)))]
    posterior, prior = grid.reshape(-1, 2, 1, 1), grid.flip(0).reshape(-1, 2, 1, 1)
    noise = torch.ones(len(grid), 1, 1, 1)
    floor = 0.0 if clamp is None else 0.01
    args = (posterior, prior, noise, None, False, clamp, floor)
    found = {f"output {i}": t for i, t in enumerate(functions["residual_normal"](*args))}
    found["log_prob"] = functions["normal_log_prob"](noise, posterior, clamp, floor)
    if clamp is not None:  # without a clamp, infinities meet in another order
        upstream = [torch.ones_like(noise), *(torch.ones(len(grid), 1) for _ in range(3))]
        gradients = functions["residual_normal_backward"](*upstream, *args, True, True, True)
        found |= {f"gradient {i}": t for i, t in enumerate(gradients)}
    return found


STREAMS = [
    ((2, 20, 4, 6), -3),
    ((3, 5, 7, 9), 2**62 + 9),
    ((4, 6, 1, 1), 0),
    ((2, 1, 5, 5), -(2**63)),
    ((2, 34, 2, 2), 7),
]


def run_cases(group: str, path: str) -> None:
    """In the process with the interpreter: the kernels' results to ``path``. Fresh memory holds NaN there."""
    from triton.runtime import interpreter

    from nvae_fast.kernels import map_launch
    from nvae_fast.kernels import normal_log_prob as lp
    from nvae_fast.kernels import normal_sample as ns
    from nvae_fast.kernels import residual_normal as rn

    functions = {name: f for module in (rn, ns, lp) for name, f in vars(module).items() if name in OPERATORS}
    if hasattr(interpreter.InterpreterBuilder, "create_fma"):
        interpreter.InterpreterBuilder.create_fma = fused
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found: dict[str, torch.Tensor] = {}
    for case in cases(group):
        before = {name: getattr(map_launch, name) for name, _ in case.choices}
        for name, value in case.choices:
            setattr(map_launch, name, value)
        map_launch._plan.cache_clear()
        once = compute(case, functions[case.op], functions[f"{case.op}_backward"])
        if case.choices in (TWO_TILES, LARGE):
            again = compute(case, functions[case.op], functions[f"{case.op}_backward"])
            assert all(torch.equal(value, again[key]) for key, value in once.items()), "two runs differ"
        for name, value in before.items():
            setattr(map_launch, name, value)
        map_launch._plan.cache_clear()
        found |= {f"{case.name} | {key} | {layout_of(value)}": value.float() for key, value in once.items()}
    if group == "others":
        for (size, seed), (layout, memory_format) in itertools.product(STREAMS, FORMATS.items()):
            # mu 0, sigma 1: z is the noise.
            b, z, h, w = size
            params = torch.zeros(b, 2 * z, h, w).contiguous(memory_format=memory_format)
            drawn = rn.residual_normal(params, None, None, torch.tensor(seed), True, None, 0.0)[0]
            assert torch.equal(drawn, ns.normal_sample(params, None, torch.tensor(seed), 1.0, None, 0.0))
            found[f"stream | {size} | {seed} | {layout}"] = drawn.contiguous()
        for name, (clamp, _) in HARD_SETTINGS.items():
            found |= {f"hard | {name} | {key}": value for key, value in hard(clamp, functions).items()}
    np.savez(path, **{key: value.numpy() for key, value in found.items()})


def interpreted(group: str) -> dict[str, torch.Tensor]:
    pytest.importorskip("triton")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.npz"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, __file__, group, str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return {key: torch.from_numpy(value) for key, value in np.load(path).items()}


@pytest.mark.parametrize("group", ["residual_normal", "others"])
def test_interpreter(group: str) -> None:
    found = interpreted(group)
    if group == "others":
        check_per_image(found)
        for setting in HARD_SETTINGS:
            check_extremes(found, setting)
    check_cases(group, {key: value for key, value in found.items() if not key.startswith(("stream", "hard"))})


def check_cases(group: str, found: dict[str, torch.Tensor]) -> None:
    """Values and gradients, their dtypes and strides, against the reference in float64 on the same inputs."""
    for case in cases(group):
        forward, backward = DEFINITIONS[case.op], DEFINITIONS[f"{case.op}_backward"]
        with nf.use_backend("reference"):
            truth = compute(case, forward.formula, backward.formula, torch.float64, True)
            native = compute(case, forward.formula, backward.formula, None, True)
            args, backward_args = arguments(case, None, False)
            shapes = forward.fake(*args)
            shapes = (shapes,) if isinstance(shapes, torch.Tensor) else shapes
            shapes = [*shapes, *(t for t in backward.fake(*backward_args) if t.dim() == 4)]
        for (key, expected), like in zip(truth.items(), shapes, strict=True):
            name = f"{case.name} | {key} | {layout_of(like)}"
            assert name in found, (
                f"{name} is missing; there are {[n for n in found if n.startswith(case.name)]}"
            )
            unavoidable = relative_error(expected.to(like.dtype), expected)
            lost = relative_error(native[key], expected)
            bound = case.tolerance * max(lost, unavoidable, torch.finfo(torch.float32).eps)
            error = relative_error(found.pop(name), expected)
            assert error <= bound, f"{name}: relative error {error:.3g} exceeds {bound:.3g}"
    assert not found, f"not expected: {sorted(found)}"


def check_per_image(found: dict[str, torch.Tensor]) -> None:
    """The draws inside the kernels are the stream of philox_normal, in every layout."""
    for size, seed in STREAMS:
        expected = philox_normal(size, seed)
        for layout in BOTH:
            assert (found[f"stream | {size} | {seed} | {layout}"] - expected).abs().max() <= 1e-6, (
                size,
                layout,
            )


def check_extremes(found: dict[str, torch.Tensor], setting: str) -> None:
    """NaN where the reference has NaN, and the same numbers elsewhere."""
    names = ("residual_normal", "residual_normal_backward", "normal_log_prob")
    functions = {name: DEFINITIONS[name].formula for name in names}
    with nf.use_backend("reference"):
        expected = hard(HARD_SETTINGS[setting][0], functions)
    for key, value in expected.items():
        actual = found[f"hard | {setting} | {key}"]
        scale = 1.0
        if key.startswith("gradient"):
            # Ratios of sigmas are e^20 there, times slopes of which the reference has the rounding of 1 - tanh^2 left.
            scale = float(value.nan_to_num(posinf=0, neginf=0).abs().max())
        torch.testing.assert_close(
            actual, value, rtol=2e-5, atol=2e-5 * scale, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


# Launching.


def test_launch_choices() -> None:
    """One axis, few programs, wide offsets where they are due; tiles cover the map whatever its size."""
    pytest.importorskip("triton")
    from nvae_fast.kernels.map_launch import MULTIPROCESSORS, Map, _plan

    for batches, channels, pixels in itertools.product(
        (1, 7, 200, 65_537), (1, 20, 33, 130), (1, 13, 64, 2304, 2**20)
    ):
        for by_channels, sums in itertools.product((True, False), repeat=2):
            width = 4 if by_channels and channels % 4 == 0 else 2 if by_channels and channels % 2 == 0 else 1
            tile, chunks, programs, warps = _plan(
                batches, channels, pixels, by_channels, width, 4, False, sums
            )
            assert programs < 2**31 or batches * channels * pixels > 2**40
            assert chunks * tile.iterations * tile.span >= pixels
            if by_channels:
                assert tile.bundle >= tile.groups * tile.parts
                assert tile.span == tile.lanes // tile.bundle * tile.pixels
                assert tile.groups * tile.slices * tile.width >= channels
                assert programs == -(-batches * chunks // tile.parts) * tile.slices
            else:
                assert programs == -(-batches * channels // tile.lanes) * chunks
            count = batches * channels * pixels
            if count > 2**20 and pixels in (64, 2304, 2**20) and channels == 20:
                work = programs * tile.iterations * tile.lanes * tile.width * tile.pixels
                assert work <= 1.5 * count, (batches, channels, pixels, tile)
            # Four elements a thread where there would be too few programs, up to 16 where there are enough.
            elements = tile.lanes * tile.width * tile.pixels // (32 * warps)
            if count < 4 * 128 * MULTIPROCESSORS and not sums:
                assert elements <= 4, (batches, channels, pixels, tile)
            if count > 2**24 and channels == 20 and pixels in (64, 2**20):
                assert elements == (16 if by_channels else 8), (batches, channels, pixels, tile)
    # The sizes of the model keep nine lanes in ten at work; where sums would need a second launch, six.
    for pixels, batches in itertools.product((16, 64, 256, 1024, 4096, 16384), (32, 64, 200)):
        for sums, busy in ((False, 0.9), (True, 0.6)):
            tile, _, programs, _ = _plan(batches, 20, pixels, True, 4, 4, False, sums)
            lanes = programs * tile.iterations * tile.lanes * tile.width * tile.pixels
            assert batches * 20 * pixels >= busy * lanes, (pixels, tile)
    small = torch.empty(1, 4, 2, 2)
    assert not Map("op", small, packed=True).launch(sums=False).tile.offsets64
    large = torch.empty(1).expand(5, 2**16, 2**13, 1)
    space = Map("op", large, packed=True)
    assert space.launch(sums=False).tile.offsets64


def test_float64_is_the_references() -> None:
    pytest.importorskip("triton")
    case = Case("residual_normal", size=(2, 2, 3, 2), noise=True)
    for op in OPS:
        case = replace(case, op=op)
        forward, backward = DEFINITIONS[op], DEFINITIONS[f"{op}_backward"]
        found = compute(case, forward.launch, backward.launch, torch.float64)
        expected = compute(case, forward.formula, backward.formula, torch.float64)
        for key, value in expected.items():
            assert torch.equal(found[key], value)
        kernels = __import__(f"nvae_fast.kernels.{op}", fromlist=["_"])
        with pytest.raises(
            TypeError, match=f"^{op}: the GPU kernel computes in float32; .*got torch.float64"
        ):
            compute(case, getattr(kernels, op), getattr(kernels, f"{op}_backward"), torch.float64, True)


def test_empty() -> None:
    pytest.importorskip("triton")
    for op, size in itertools.product(OPS, ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4))):
        kernels = __import__(f"nvae_fast.kernels.{op}", fromlist=["_"])
        case = Case(op, size=size, noise=True)
        found = compute(case, getattr(kernels, op), getattr(kernels, f"{op}_backward"), None, True)
        expected = compute(case, DEFINITIONS[op].formula, DEFINITIONS[f"{op}_backward"].formula, None, True)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        assert all(not value.any() for value in found.values())


if __name__ == "__main__":
    interpreter.prepare()
    run_cases(sys.argv[1], sys.argv[2])
