"""The vector functions of csrc/: every instruction set against the C library in float64."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "native" / "vec_accuracy.cpp"
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
LEVELS = {
    "baseline": (0, []),
    "avx2": (1, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (2, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]),
}
# Units in the last place; csrc/vec_math.h has the errors of a full sweep.
BOUNDS = {"exp": 1.25, "log": 1.25, "log_positive": 1.25, "tanh": 1.75, "sigmoid": 2.75, "cos_turn": 2.0}
BOUNDS |= {"exp_negative": 1.25, "expm1": 1.25, "log1p_positive": 1.75}
BOUNDS["sin_turn"] = BOUNDS["cos_turn"]
EVERY = 4099  # a prime, so that all exponents and all patterns of mantissa bits come by


def _processor_has(level: str) -> bool:
    if level == "baseline":
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    flags = Path("/proc/cpuinfo")
    needed = {"avx2": ["avx2", "fma"], "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"]}[level]
    known = flags.read_text(encoding="utf-8").split() if flags.exists() else []
    return all(flag in known for flag in needed)


@pytest.mark.parametrize("level", LEVELS)
def test_vector_functions(level: str, tmp_path: Path) -> None:
    if CXX is None:
        pytest.skip("no C++ compiler")
    if not _processor_has(level):
        pytest.skip(f"this processor has no {level}")
    number, flags = LEVELS[level]
    program = tmp_path / "vec_accuracy"
    command = [CXX, "-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", *flags]
    command += [f"-DNVAE_CAPABILITY={number}", f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(program)]
    # GCC takes its own _mm512_undefined_ps for a use of an uninitialised value.
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program), str(EVERY)], capture_output=True, text=True, check=True)
    errors = {name: (float(worst), where) for name, worst, where in map(str.split, ran.stdout.splitlines())}
    assert errors.pop("conversions")[0] == 0
    assert errors.pop("stream")[0] == 0
    assert errors.keys() == BOUNDS.keys()
    for name, (worst, where) in errors.items():
        bound = 3.0 if level == "baseline" and name.endswith("_turn") else BOUNDS[name]
        assert worst <= bound, f"{name}({where}) is off by {worst} units in the last place"
