"""Builds the C++ extension ``nvae_fast._C`` with ninja; everything else about the package is in
pyproject.toml.

The extension uses PyTorch's stable ABI and CPython's limited API: one binary for many versions of both. It is
optional: without a compiler the package installs and works on PyTorch's own kernels, and
``nvae_fast.ops._extension.reason()`` says why. ``python setup.py build_ext --inplace`` asks for the extension
and so fails where it cannot be built.

Environment:
    CXX                            C++ compiler (default: c++, g++ or clang++, whichever is found first)
    MAX_JOBS                       compilers at a time (default: cores, fewer when memory is short)
    NVAE_FAST_NO_EXTENSION=1       build the package without it: a wheel for every platform, in seconds
    NVAE_FAST_REQUIRE_EXTENSION=1  fail the installation when the extension cannot be built
    NVAE_FAST_NO_CUDA=1            leave csrc/cuda out
    NVAE_FAST_FORCE_CUDA=1         compile csrc/cuda although the PyTorch at hand has no CUDA
    NVAE_FAST_CUDA_ARCHS           default "sm_80,sm_90a,sm_100"
    NVAE_FAST_SANITIZE             for tests: sanitizers of the compiler, such as "address,undefined"
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
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = (2, 10)  # the oldest PyTorch whose stable ABI the sources need
TARGET_NAME = "{}.{}".format(*TORCH_TARGET)
CUDA_ARCHS = "sm_80,sm_90a,sm_100"
# GCC takes its own _mm512_undefined_ps for a use of an uninitialised value (its bug 105593).
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One object file per capability from each *.vec.cpp. FMA contraction stays off, so that only fma() fuses. Processors
# without AVX2 are rare by now: their kernels compile in half the time.
CAPABILITIES = {
    "baseline": ["-O1"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", *QUIET],
}
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
# Kernels are single functions of many thousand lines once they are inlined: these checks would compile for an hour.
SANITIZED_KERNELS = ["-O1", "-fno-sanitize=null,alignment,object-size,pointer-overflow"]
SANITIZED_KERNELS += ["-fno-sanitize-address-use-after-scope"]
MEMORY_PER_JOB = 1.5e9  # bytes; PyTorch's headers take most of it


class Unavailable(Exception):
    """The extension cannot be built here, and why; the package works without."""


def first_error(output: str) -> str:
    """The line of a failed build that says what was wrong: the first error of a compiler or linker, else the last line."""
    lines = [line.strip().replace(f"{ROOT}{os.sep}", "") for line in output.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED:")), -2)
    # What follows it is the command, which may name anything, and then the output.
    said = [line for line in lines[start + 2 :] if not re.match(r"\[\d+/\d+\]|ninja: (build|job|sub)", line)]
    telling = re.compile(
        r"\b(error|fatal)\b\s*(\w+\s*)?:|undefined reference|cannot find|not found|No such file|Killed"
    )
    found = next(
        (line for line in said if telling.search(line) and "warning:" not in line),
        (said or ["it printed nothing"])[-1],
    )
    return found if len(found) <= 300 else found[:297] + "..."


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


# The package itself is not imported: what else it needs may not be there yet.
FINGERPRINT = """
import sys, types
package = sys.modules["nvae_fast"] = types.ModuleType("nvae_fast")
package.__path__ = [sys.argv[1]]
from nvae_fast.ops import _schemas
print("fingerprint", _schemas.fingerprint())
"""


def fingerprint() -> str:
    """Of the operators' schemas; compiled in, so that a binary made for others is not loaded. PyTorch is imported for it, in a
    process of its own."""
    environment = {**os.environ, "NVAE_FAST_DISABLE_EXTENSION": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, str(ROOT / "nvae_fast")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^fingerprint (\w+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        lines = done.stderr.strip().splitlines()
        raise Unavailable(f"the operators cannot be imported: {lines[-1] if lines else done.returncode}")
    return found[1]


class Cuda(NamedTuple):
    nvcc: str
    home: Path  # the toolkit's folder, with include/ and lib64/
    archs: list[str]  # sm_80: machine code, compute_100: PTX

    def code(self) -> list[str]:
        """nvcc's flags for all of them."""
        return [
            word
            for arch in self.archs
            for word in ("-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}")
        ]


def cuda_toolkit(torch_has_cuda: bool) -> Cuda | None:
    """The CUDA compiler to use, or None when csrc/cuda is to be left out."""
    forced = enabled("NVAE_FAST_FORCE_CUDA")
    if enabled("NVAE_FAST_NO_CUDA") or not (torch_has_cuda or forced):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not found or not os.path.exists(found):
        if forced:
            raise Unavailable("NVAE_FAST_FORCE_CUDA is set but nvcc was not found (CUDA_HOME, PATH)")
        return None
    # nvcc may be a wrapper elsewhere; a dry run says where its toolkit is.
    dry = subprocess.run(
        [found, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    folder = Path(top[1]).resolve() if top else Path(found).resolve().parent.parent
    listed = subprocess.run([found, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = listed.stdout.split()
    wanted = [a for a in re.split(r"[,;\s]+", os.environ.get("NVAE_FAST_CUDA_ARCHS", CUDA_ARCHS)) if a]
    bad = [a for a in wanted if not re.fullmatch(r"sm_\d+[af]?", a)]
    if bad:
        raise SystemExit(f"NVAE_FAST_CUDA_ARCHS: expected names such as sm_90a, got {', '.join(bad)}")
    archs = [a for a in wanted if not known or re.sub("[af]$", "", a) in known]
    if not archs:
        raise Unavailable(f"{found} compiles for none of {', '.join(wanted)}")
    # PTX of the newest architecture that is not for one chip only lets later GPUs run it too.
    portable = [int(a[3:]) for a in archs if a[-1].isdigit()]
    if portable:
        archs.append(f"compute_{max(portable)}")
    return Cuda(found, folder, archs)


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


class NinjaFile:
    """The text of build.ninja: how each source of csrc/ is compiled, and the link."""

    def __init__(self, cxx: list[str]) -> None:
        self.objects: list[str] = []
        self.lines: list[str] = []
        self.rule("cxx", [*cxx, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depends=True)
        self.rule("link", [*cxx, "$flags", "$in", "$libs", "-o", "$out"])

    @staticmethod
    def words(values: Sequence[str | Path]) -> str:
        """For the shell, with ninja's own dollar signs doubled; $in and the like stay."""
        shell = (
            v if re.fullmatch(r"\$\w+(\.d)?", v) else shlex.quote(v).replace("$", "$$")
            for v in map(str, values)
        )
        return " ".join(shell)

    @staticmethod
    def path(value: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def rule(self, name: str, command: Sequence[str | Path], depends: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {self.words(command)}", "  description = $out"]
        if depends:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, source: Path, name: str, rule: str, flags: Sequence[str | Path]) -> None:
        self.objects.append(f"{name}.o")
        self.lines += [f"build {name}.o: {rule} {self.path(source)}", f"  flags = {self.words(flags)}"]

    def link(self, target: Path, flags: Sequence[str], libraries: Sequence[str]) -> None:
        self.lines += [f"build {self.path(target)}: link {' '.join(self.objects)}"]
        self.lines += [f"  flags = {self.words(flags)}", f"  libs = {self.words(libraries)}"]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def leave_reason(reason: str | None, build_lib: str) -> None:
    """Why there is no extension, where the package looks for it, in sources and build; None removes what is there."""
    for folder in (ROOT, ROOT / build_lib):
        report = folder / "nvae_fast" / "_build.json"
        report.unlink(missing_ok=True)
        if reason is not None and report.parent.is_dir():
            report.write_text(json.dumps({"reason": reason}) + "\n", encoding="utf-8")


class PureBuild(build_py):
    """For NVAE_FAST_NO_EXTENSION, with which build_ext does not run."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            leave_reason("it was left out with NVAE_FAST_NO_EXTENSION", self.build_lib)


class NinjaBuild(build_ext):
    """Writes build.ninja for csrc/ and runs it: flags for each file, and only what changed is compiled."""

    def run(self) -> None:
        required = enabled("NVAE_FAST_REQUIRE_EXTENSION") or "build_ext" in sys.argv
        leave_reason(None, self.build_lib)
        try:
            super().run()
        except Unavailable as error:
            reason = str(error)
            if required:
                raise SystemExit(f"nvae_fast: the C++ extension cannot be built: {reason}") from None
            print(f"warning: nvae_fast: installing without the C++ extension: {reason}", file=sys.stderr)
            leave_reason(reason, self.build_lib)
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
        ninja_file = self.ninja_file(cxx, torch, cuda_toolkit(torch_has_cuda), target)
        (folder / "build.ninja").write_text(ninja_file.text(), encoding="utf-8")
        program = shutil.which("ninja")
        if program is None and find_spec("ninja") is None:
            raise Unavailable("ninja was not found")
        ninja = [program] if program else [sys.executable, "-m", "ninja"]
        self.run_ninja([*ninja, "-C", str(folder), "-j", str(jobs())])

    @staticmethod
    def run_ninja(command: list[str]) -> None:
        """Run ninja; a failure names the first error, because pip shows the output of a build to those only who ask."""
        # Messages in English, for first_error.
        environment = {**os.environ, "LC_ALL": "C"}
        output = []
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout:
                output.append(line)
                print(line, end="", flush=True)
        if process.returncode:
            raise Unavailable(
                f"the compiler failed: {first_error(''.join(output))} (`pip install -v` shows all of its output)"
            )

    def ninja_file(self, cxx: list[str], torch: Path, cuda: Cuda | None, target: Path) -> NinjaFile:
        out = NinjaFile(cxx)
        includes = [f"-I{CSRC}", f"-isystem{torch / 'include'}"]
        includes += [f"-isystem{path}" for path in dict.fromkeys(self.include_dirs) if path]
        common = [*FLAGS, *includes]
        if X86:
            common.append("-DNVAE_HAVE_X86")
        binding = [f"-DTORCH_TARGET_VERSION=(({TORCH_TARGET[0]}ULL << 56) | ({TORCH_TARGET[1]}ULL << 48))"]
        binding.append(f'-DNVAE_TORCH_TARGET="{TARGET_NAME}"')
        if cuda:
            binding += ["-DNVAE_HAVE_CUDA", f'-DNVAE_CUDA_ARCHS="{",".join(cuda.archs)}"']
            binding.append(f"-isystem{cuda.home / 'include'}")
        extra, kernel, sanitize = shlex.split(os.environ.get("CXXFLAGS", "")), [], []
        if sanitizers := os.environ.get("NVAE_FAST_SANITIZE"):
            sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
            extra = [*sanitize, "-g1", "-fno-omit-frame-pointer", *QUIET, "-fno-sanitize=vptr", "-O0", *extra]
            kernel = SANITIZED_KERNELS

        for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]):
            if source.name.endswith(".vec.cpp"):
                for level, (name, flags) in enumerate(CAPABILITIES.items() if X86 else [("baseline", [])]):
                    flags = [*common, *flags, f"-DNVAE_CAPABILITY={level}", *extra, *kernel]
                    out.compile(source, f"{source.name[:-8]}.{name}", "cxx", flags)
            else:
                schemas = [f'-DNVAE_SCHEMAS="{fingerprint()}"'] if source.name == "module.cpp" else []
                flags = [*common, "-O2", *binding, *schemas, *extra]
                out.compile(source, f"{source.parent.name}.{source.stem}", "cxx", flags)
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
        if cuda:
            out.rule(
                "nvcc", [cuda.nvcc, "$flags", "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depends=True
            )
            flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]
            flags += ["-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
            flags += cuda.code()
            for source in sorted(CSRC.glob("cuda/*.cu")):
                out.compile(source, f"cuda.{source.stem}.cu", "nvcc", flags)
            for source in sorted(CSRC.glob("cuda/*.cpp")):
                out.compile(source, f"cuda.{source.stem}", "cxx", [*common, *binding, *extra])
            # The static runtime: the binary then does not depend on the minor version of PyTorch's own.
            folders = [cuda.home / name for name in ("lib64", "lib")]
            libraries += [f"-L{f}" for f in folders if f.is_dir()]
            libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        if sys.platform == "darwin":
            shared = ["-shared", "-undefined", "dynamic_lookup"]
        else:
            shared = ["-shared", "-Wl,--as-needed", "-Wl,-z,relro,-z,now", *(sanitize or ["-s"])]
        out.link(target, shared, libraries)
        return out


# The sources are found by NinjaBuild; py_limited_api gives the file and the wheel their abi3 names.
EXTENSION = dict(
    ext_modules=[Extension("nvae_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
if enabled("NVAE_FAST_NO_EXTENSION") and enabled("NVAE_FAST_REQUIRE_EXTENSION"):
    raise SystemExit("nvae_fast: NVAE_FAST_NO_EXTENSION and NVAE_FAST_REQUIRE_EXTENSION exclude each other")
setup(
    license="Apache-2.0",
    **(dict(cmdclass={"build_py": PureBuild}) if enabled("NVAE_FAST_NO_EXTENSION") else EXTENSION),
)
