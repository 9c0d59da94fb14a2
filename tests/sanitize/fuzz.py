"""Call every operator of ``torch.ops.nvae_fast`` at random and compare with its formula.

    PYTHONPATH=tests python -m sanitize.fuzz --cases 5000 [--seed 0] [--first 0] [--only residual_normal] [--journal FILE]

Every second call has an argument of another shape, dtype, length or value than it should. Then an exception or the formula's
result is expected. The calls follow from seed and number; ``make sanitize`` runs them with AddressSanitizer and UBSan, which
end the process at the first fault. ``--journal`` names a file that then holds the number of the call.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nvae_fast
from nvae_fast.ops import _extension, _op
from sanitize import calls

# Of the norm of a result; the tests of the operators have tight ones.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# A formula that is given None for a tensor raises AttributeError.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def operators() -> list[str]:
    """Every operator with a C++ kernel."""
    key = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(name for name in _op.DEFINITIONS if key(f"nvae_fast::{name}", "CPU"))


def arguments(d: calls.Draw, name: str) -> list[Any]:
    if name.removesuffix("_backward") in calls.DERIVED and name.endswith("_backward"):
        forward = name.removesuffix("_backward")
        return calls.derived_backward(d, forward, _op.DEFINITIONS[forward].formula)
    return getattr(calls, name)(d)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def difference(found: Any, expected: Any, loosest: torch.dtype) -> str | None:
    found, expected = tensors(found), tensors(expected)
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"shapes {[tuple(t.shape) for t in found]}, expected {[tuple(t.shape) for t in expected]}"
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {i} differs"
            continue
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return f"result {i}: other elements are finite"
        a, b = a[finite], b[finite]
        tolerance = max(TOLERANCE[loosest], TOLERANCE.get(found[i].dtype, 0.0))
        error = float((a - b).norm())
        if error > tolerance * (float(b.norm()) + 0.1 * max(b.numel(), 1) ** 0.5):
            return f"result {i}: error {error:.3g}, norm {float(b.norm()):.3g}"
    return None


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}/{value.stride()}"
    return f"[{', '.join(map(kind, value))}]" if isinstance(value, (list, tuple)) else repr(value)


def run(name: str, seed: int, number: int) -> tuple[str, str | None]:
    """What became of a call, and what is wrong about that."""
    d = calls.Draw(f"{seed}/{number}/{name}")
    definition = _op.DEFINITIONS[name]
    args = arguments(d, name)
    compared = wrong = number % 2 == 1
    if wrong:
        for _ in range(d.one(1, 1, 2)):
            i = d.random.randrange(len(args))
            if (name, i) == ("spectral_lengths", 2):
                args[i] = d.one(0, -1)  # others would take as long as they say
            else:
                args[i] = calls.wrong_value(d, args[i])
            compared = compared and not isinstance(args[i], float)
    else:
        compared = True
    given = copy.deepcopy(args)
    what = f"{name}({', '.join(map(kind, args))})"
    try:
        found = getattr(torch.ops.nvae_fast, name)(*args)
    except REFUSALS as error:
        text = str(error)
        if not wrong:
            return "refused", f"{what}: {text}"
        undefined = "Not yet supported ScalarType" in text  # PyTorch's own text for None in place of a tensor
        if not undefined and ("API call failed" in text or ".cpp" in text or ".h:" in text):
            return "refused", f"{what}: unclear error: {text}"
        return "refused", None
    if not compared or (
        name == "squeeze_excite" and args[0].numel() == 0
    ):  # the mean of nothing is 0, or NaN
        return "ran", None
    try:
        expected = definition.formula(*given)
    except REFUSALS as error:
        if any(t.numel() == 0 for t in tensors(given)):
            return "ran", None  # PyTorch's convolutions and products refuse what is empty
        if "same dtype" in str(error):
            return "ran", None  # and products of two dtypes, of which the kernels convert one
        return "ran", f"{what}: gave a result, the formula raises {type(error).__name__}: {error}"
    if name == "adamax":
        found, expected = args, given
    floats = [t.dtype for t in tensors(given) if t.dtype in TOLERANCE] or [torch.float32]
    if wrong and any(t.dtype not in TOLERANCE for t in tensors(expected)):
        return "ran", None if tensors(found)[0].dtype == tensors(expected)[
            0
        ].dtype else f"{what}: other dtypes"
    problem = difference(found, expected, max(floats, key=lambda dtype: TOLERANCE[dtype]))
    return "ran", None if problem is None else f"{what}: {problem}"


def fuzz(cases: int, seed: int = 0, first: int = 0, only: Sequence[str] = (), journal: str | None = None,
         report: Callable[[str], None] = print) -> Counter[str]:  # fmt: skip
    """Counts of calls that ran, were refused and were wrong."""
    names = list(only) or operators()
    counts: Counter[str] = Counter()
    for number in range(first, first + cases):
        name = names[number // 2 % len(names)]
        if journal:
            Path(journal).write_text(f"--seed {seed} --first {number} --cases 1 ({name})\n", encoding="utf-8")
        outcome, problem = run(name, seed, number)
        counts[outcome] += 1
        if problem is not None:
            counts["wrong"] += 1
            report(f"case {number}: {problem}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument(
        "--journal", help="a file that names the call that runs, for one that ends the process"
    )
    parser.add_argument("--library", help="the folder that nvae_fast must be imported from")
    given = parser.parse_args()
    if given.library and not Path(nvae_fast.__file__).is_relative_to(given.library):
        print(f"nvae_fast was imported from {nvae_fast.__file__}, not from {given.library}")
        return 2
    if not _extension.load():
        print(f"the C++ extension is needed: {_extension.reason()}")
        return 2
    torch.set_num_threads(2)
    counts = fuzz(given.cases, given.seed, given.first, given.only, given.journal)
    print(f"nvae_fast {nvae_fast.__version__} {_extension.info()['cpu_capability']}: {dict(counts)}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
