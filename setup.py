"""Builds the C++ extension ``nvae_fast._C`` with ninja; everything else about the package stands in
pyproject.toml.

The extension uses PyTorch's stable ABI and CPython's limited API: one binary for many versions of both. It is
optional: without a compiler the package installs and works on PyTorch's own kernels, and
``nvae_fast.ops._extension.reason()`` says why. ``python setup.py build_ext --inplace`` asks for the extension
and so fails where it cannot be built.

Environment:
    CXX                            C++ compiler (default: c++, g++ or clang++, whichever is found first)
    MAX_JOBS                       compilers at a time (default: cores, fewer when memory is short)
    NVAE_FAST_REQUIRE_EXTENSION=1  fail the installation when the extension cannot be built
    NVAE_FAST_NO_CUDA=1            leave csrc/cuda out
    NVAE_FAST_FORCE_CUDA=1         compile csrc/cuda although the PyTorch at hand has no CUDA
    NVAE_FAST_CUDA_ARCHS           default "sm_80,sm_90a,sm_100"
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = (2, 10)  # the oldest PyTorch whose stable ABI the sources need
TARGET_NAME = "{}.{}".format(*TORCH_TARGET)
CUDA_ARCHS = "sm_80,sm_90a,sm_100"
# GCC takes its own _mm512_undefined_ps for a use of an uninitialised value (its bug 105593).
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One object file per capability from each *.vec.cpp. FMA contraction stays off, so that only fma() fuses.
CAPABILITIES = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", *QUIET],
}
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
MEMORY_PER_JOB = 1.5e9  # bytes; PyTorch's headers take most of it


class Unavailable(Exception):
    """The machine lacks something the extension needs; the package works without."""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def torch_folder() -> Path:
    """PyTorch's folder, found without importing it (which takes seconds)."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("PyTorch was not found while building; install with --no-build-isolation")
    return Path(spec.submodule_search_locations[0])


def torch_version(folder: Path) -> tuple[tuple[int, int], bool]:
    """((major, minor), built with CUDA)."""
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    if version is None:
        raise Unavailable(f"{folder / 'version.py'} names no version")
    cuda = re.search(r"^cuda\b[^=]*= *'", text, re.MULTILINE)
    return (int(version[1]), int(version[2])), cuda is not None


def compiler() -> list[str]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise Unavailable(f"no C++ compiler was found ({named or 'c++, g++, clang++'})")


def cuda_toolkit(torch_has_cuda: bool) -> tuple[Path, list[str]] | None:
    """(folder, architectures) of the CUDA toolkit to use, or None."""
    if enabled("NVAE_FAST_NO_CUDA") or not (torch_has_cuda or enabled("NVAE_FAST_FORCE_CUDA")):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not found or not os.path.exists(found):
        if enabled("NVAE_FAST_FORCE_CUDA"):
            raise Unavailable("NVAE_FAST_FORCE_CUDA is set but nvcc was not found (CUDA_HOME, PATH)")
        return None
    nvcc = Path(found).resolve()
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
    ).stdout.split()
    wanted = [a for a in re.split(r"[,;\s]+", os.environ.get("NVAE_FAST_CUDA_ARCHS", CUDA_ARCHS)) if a]
    bad = [a for a in wanted if not re.fullmatch(r"sm_\d+[af]?", a)]
    if bad:
        raise SystemExit(f"NVAE_FAST_CUDA_ARCHS: expected names such as sm_90a, got {', '.join(bad)}")
    archs = [a for a in wanted if not known or re.sub("[af]$", "", a) in known]
    if not archs:
        raise Unavailable(f"{nvcc} compiles for none of {', '.join(wanted)}")
    return nvcc.parent.parent, archs


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1])
    except (OSError, TypeError):
        free = 8e9
    return max(1, min(cores, int(free / MEMORY_PER_JOB)))


def quote(words: list[str]) -> str:
    return " ".join(
        word if re.fullmatch(r"\$\w+", word) else shlex.quote(word).replace("$", "$$") for word in words
    )


class NinjaBuild(build_ext):
    """Writes build.ninja for csrc/ and runs it: flags for each file, and only what changed is compiled."""

    def run(self) -> None:
        report = ROOT / "nvae_fast" / "_build.json"
        required = enabled("NVAE_FAST_REQUIRE_EXTENSION") or "build_ext" in sys.argv
        report.unlink(missing_ok=True)
        try:
            super().run()
        except (Unavailable, subprocess.CalledProcessError) as error:
            reason = (
                f"the compiler failed ({error})"
                if isinstance(error, subprocess.CalledProcessError)
                else str(error)
            )
            if required:
                raise SystemExit(f"nvae_fast: the C++ extension cannot be built: {reason}") from error
            print(f"warning: nvae_fast: installing without the C++ extension: {reason}", file=sys.stderr)
            for folder in {ROOT / "nvae_fast", Path(self.build_lib) / "nvae_fast"}:
                if folder.is_dir():
                    (folder / report.name).write_text(json.dumps({"reason": reason}) + "\n", encoding="utf-8")
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise Unavailable("the sources need GCC or Clang; Windows is not supported yet")
        cxx, torch = compiler(), torch_folder()
        version, torch_has_cuda = torch_version(torch)
        if version < TORCH_TARGET:
            raise Unavailable(f"PyTorch {version[0]}.{version[1]} is older than the {TARGET_NAME} needed")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = self.ninja_file(cxx, torch, cuda_toolkit(torch_has_cuda), target)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if len(ninja) > 1 and find_spec("ninja") is None:
            raise Unavailable("ninja was not found")
        subprocess.run([*ninja, "-C", str(folder), "-j", str(jobs())], check=True)

    def ninja_file(
        self, cxx: list[str], torch: Path, cuda: tuple[Path, list[str]] | None, target: Path
    ) -> list[str]:
        target_version = f"(({TORCH_TARGET[0]}ULL << 56) | ({TORCH_TARGET[1]}ULL << 48))"
        includes = [f"-I{CSRC}", f"-isystem{torch / 'include'}"]
        includes += [f"-isystem{path}" for path in dict.fromkeys(self.include_dirs) if path]
        common = [*FLAGS, *includes, "-DNVAE_HAVE_X86"] if X86 else [*FLAGS, *includes]
        binding = [f"-DTORCH_TARGET_VERSION={target_version}", f'-DNVAE_TORCH_TARGET="{TARGET_NAME}"']
        if cuda:
            binding += [
                "-DNVAE_HAVE_CUDA",
                f'-DNVAE_CUDA_ARCHS="{",".join(cuda[1])}"',
                f"-I{cuda[0] / 'include'}",
            ]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        lines = [
            "rule cxx",
            f"  command = {quote(cxx)} $flags -MMD -MF $out.d -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {quote(cxx)} $flags $in $libs -o $out",
            "  description = $out",
        ]
        objects = []

        def compile_one(source: Path, name: str, rule: str, flags: list[str]) -> None:
            objects.append(f"{name}.o")
            lines.append(f"build {name}.o: {rule} {str(source).replace(' ', '$ ')}")
            lines.append(f"  flags = {quote(flags)}")

        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
            if source.name.endswith(".vec.cpp"):
                for level, (name, flags) in enumerate(CAPABILITIES.items() if X86 else [("baseline", [])]):
                    defined = [f"-DNVAE_CAPABILITY={level}"]
                    compile_one(
                        source, f"{source.name[:-8]}.{name}", "cxx", [*common, *flags, *defined, *extra]
                    )
            else:
                compile_one(source, f"{source.parent.name}.{source.stem}", "cxx", [*common, *binding, *extra])
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
        if cuda:
            home, archs = cuda
            lines += [
                "rule nvcc",
                f"  command = {quote([str(home / 'bin' / 'nvcc')])} $flags -MD -MF $out.d -c $in -o $out",
            ]
            lines += ["  depfile = $out.d", "  deps = gcc"]
            flags = [
                "-std=c++17",
                "-O3",
                "--expt-relaxed-constexpr",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                f"-I{CSRC}",
            ]
            for arch in archs:
                flags += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
            # PTX of the newest plain architecture lets later GPUs run it too.
            plain = [a.replace("sm", "compute") for a in archs if a[-1].isdigit()]
            if plain:
                flags += ["-gencode", f"arch={plain[-1]},code={plain[-1]}"]
            for source in sorted(CSRC.glob("cuda/*.cu")):
                compile_one(source, f"cuda.{source.stem}.cu", "nvcc", flags)
            for source in sorted(CSRC.glob("cuda/*.cpp")):
                compile_one(source, f"cuda.{source.stem}", "cxx", [*common, *binding, *extra])
            lib = next(
                (home / d for d in ("lib64", "lib") if (home / d / "libcudart_static.a").exists()),
                home / "lib64",
            )
            libraries += [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,--as-needed", "-Wl,-z,relro,-z,now", "-s"]
        if sys.platform == "darwin":
            shared = ["-shared", "-fPIC", "-undefined", "dynamic_lookup"]
        path = str(target).replace(" ", "$ ")
        lines += [
            f"build {path}: link {' '.join(objects)}",
            f"  flags = {quote(shared)}",
            f"  libs = {quote(libraries)}",
        ]
        lines.append(f"default {path}")
        return lines


setup(
    # The sources are found by NinjaBuild; py_limited_api gives the file its abi3 name.
    ext_modules=[Extension("nvae_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
