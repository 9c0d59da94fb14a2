"""What is built: one binary for many versions, GPU code for every architecture without spills, and a package
that works when nothing could be built.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot
import pytest
import setuptools
import torch

from nvae_fast.ops import _extension, philox

ROOT = Path(__file__).resolve().parent.parent
# The functions of CPython's limited API that csrc/module.cpp uses. All are stable since 3.2.
LIMITED_API = {
    "PyBool_FromLong",
    "PyDict_New",
    "PyDict_SetItemString",
    "PyList_New",
    "PyModule_Create2",
    "PyUnicode_FromString",
    "PyUnicode_Split",
    "_Py_Dealloc",
}


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def undefined_symbols() -> list[str]:
    if not _extension.load():
        pytest.skip(_extension.reason())
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-D", "--undefined-only", _extension.info()["path"]]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def test_the_extension_is_abi3() -> None:
    if not _extension.load():
        pytest.skip(_extension.reason())
    assert _extension.info()["path"].endswith("_C.abi3.so")


def test_only_stable_python_symbols() -> None:
    used = {name for name in undefined_symbols() if re.match(r"_?Py", name)}
    assert used
    assert used <= LIMITED_API


def test_only_stable_pytorch_symbols() -> None:
    symbols = undefined_symbols()
    # C++ symbols of PyTorch change with every version; the stable ABI is plain C.
    unstable = [name for name in symbols if re.match(r"_ZN?K?\d*(3c10|2at|5torch|5caffe)", name)]
    assert not unstable
    assert [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]


def test_info_of_the_extension() -> None:
    info = _extension.info()
    assert info["loaded"] == _extension.load()
    if not info["loaded"]:
        assert info["reason"]
        return
    assert info["reason"] is None
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"][0] == "baseline"
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == bool(info["cuda_archs"])


def test_unknown_capability_warns_and_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _extension.load()
    monkeypatch.setattr(_extension, "_tried", False)
    monkeypatch.setenv("NVAE_FAST_CPU_CAPABILITY", "avx9")
    with pytest.warns(UserWarning, match="expected one of baseline, avx2, avx512, got 'avx9'"):
        assert _extension.load() == loaded


# GPU code.


CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# The same templates once a dtype take half a minute a target: each is compiled for one of them, and for all when
# NVAE_FAST_TEST_EVERY_ARCH is set.
ONE_ARCH = {
    "depthwise_conv2d_f32": "sm_80",
    "depthwise_conv2d_bf16": "sm_90a",
    "depthwise_conv2d_f16": "sm_100",
}


@pytest.mark.parametrize("arch", aot.CUDA_ARCHS)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_sources_compile_without_spills(source: Path, arch: str) -> None:
    if ONE_ARCH.get(source.stem, arch) != arch and not os.environ.get("NVAE_FAST_TEST_EVERY_ARCH"):
        pytest.skip("compiled for another target")
    usages = aot.nvcc_usages(source, arch)
    assert usages
    assert all(usage.spill_bytes == 0 for usage in usages), usages


def test_cuda_sources_need_no_pytorch_headers() -> None:
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "torch/" not in source.read_text(encoding="utf-8"), source


# Without the extension.

_WITHOUT = """
import torch, nvae_fast as nf
from nvae_fast.ops import _extension, philox
assert not _extension.load() and _extension.info() == {"loaded": False, "reason": _extension.reason()}
z = philox.philox_normal((2, 3, 4, 5), 1, memory_format=torch.channels_last)
out = nf.residual_normal(torch.zeros(1, 4, 2, 2), seed=3)
print(_extension.reason()); print(nf.backends()["philox"]["cpu"]); print(float(z.sum()))
"""


def test_the_package_works_without_the_extension() -> None:
    done = python("-c", _WITHOUT, NVAE_FAST_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    reason, backend, total = done.stdout.splitlines()
    assert reason == "the C++ extension is disabled by NVAE_FAST_DISABLE_EXTENSION"
    assert backend == f"reference ({reason})"
    z = philox.philox_normal((2, 3, 4, 5), 1, memory_format=torch.channels_last)
    assert abs(float(total) - float(z.sum())) < 1e-4


def test_importing_is_light() -> None:
    code = (
        "import sys, torch, nvae_fast\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'sklearn', 'PIL', 'matplotlib', 'lmdb', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what setup.py needs, to build in and to break."""
    for name in ("setup.py", "pyproject.toml", "csrc", "kernels", "nvae_fast", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    return tmp_path


def test_a_machine_without_a_compiler(sources: Path) -> None:
    environment = {"CXX": "no-such-compiler"}
    done = python("setup.py", "-q", "build", cwd=sources, **environment)
    assert done.returncode == 0, done.stderr
    assert "installing without the C++ extension: no C++ compiler was found (no-such-compiler)" in done.stderr
    (built,) = (sources / "build").glob("lib*")
    assert not list(built.rglob("*.so"))
    assert json.loads((built / "nvae_fast" / "_build.json").read_text())["reason"].startswith(
        "no C++ compiler"
    )
    assert (built / "nvae_fast" / "kernels" / "philox.py").exists()
    # An editable install of this repository would lend its extension to the copy.
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "from nvae_fast.ops import _extension\n"
        "print(_extension.reason())\n"
    )
    used = python("-c", code, cwd=built, PYTHONPATH=str(built))
    assert used.stdout.strip() == (
        "the C++ extension was not built: no C++ compiler was found (no-such-compiler)"
    ), used.stderr
    # Who asks for the extension is told.
    required = python("setup.py", "-q", "build", cwd=sources, NVAE_FAST_REQUIRE_EXTENSION="1", **environment)
    assert required.returncode != 0
    assert "cannot be built: no C++ compiler" in required.stderr
    asked = python("setup.py", "-q", "build_ext", "--inplace", cwd=sources, **environment)
    assert asked.returncode != 0


# A stand-in for a compiler that takes every source for compiled but one, which it hands to the real compiler.
_COMPILER = """#!/bin/sh
last=
for word; do
  case $word in */csrc/cpu/elu.cpp) real=1;; esac
  [ "$last" = -o ] && out=$word
  [ "$last" = -MF ] && echo "$out:" > "$word"
  last=$word
done
[ "$real" ] && exec {compiler} -fsyntax-only "$@"
: > "$out"
"""


def test_a_compiler_that_fails(sources: Path) -> None:
    """pip hides what a build prints, so the first import and `info` say what was wrong, in one line."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    elu = sources / "csrc" / "cpu" / "elu.cpp"
    elu.write_text("int a() {\n  int unused;\n  return no_such_name;\n}\n")
    script = sources / "compiler"
    script.write_text(_COMPILER.format(compiler=compiler))
    script.chmod(0o755)
    settings = {"CXX": str(script), "NVAE_FAST_NO_CUDA": "1", "LC_ALL": "C.UTF-8"}
    done = python("setup.py", "-q", "build", cwd=sources, **settings)
    assert done.returncode == 0, done.stderr
    (built,) = (sources / "build").glob("lib*")
    reason = json.loads((built / "nvae_fast" / "_build.json").read_text())["reason"]
    assert re.fullmatch(
        r"the compiler failed: csrc/cpu/elu\.cpp:3:10: error: .*no_such_name.* \(`pip install -v` shows all of its output\)",
        reason,
    ), reason
    (line,) = [line for line in done.stderr.splitlines() if "installing without the C++ extension" in line]
    assert reason in line
    assert "unused" in done.stdout, "all that the compiler said is passed on"
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "from nvae_fast import cli\n"
        "cli.main(['info'])\n"
    )
    used = python("-c", code, cwd=built, PYTHONPATH=str(built))
    assert used.returncode == 0, used.stderr
    assert [reason in line for line in used.stderr.splitlines() if "nvae_fast: " in line] == [True]
    (missing,) = [line for line in used.stdout.splitlines() if line.startswith("  extension ")]
    assert reason in missing
    required = python("setup.py", "-q", "build", cwd=sources, NVAE_FAST_REQUIRE_EXTENSION="1", **settings)
    assert required.returncode != 0
    assert f"cannot be built: {reason}" in required.stderr


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "said, expected",
    [
        ("a.cpp: In function 'f':\na.cpp:1:2: warning: no error: yet\na.cpp:3:4: error: bad\nb.cpp:1: error: worse", 1 + 1),
        ('/k.cu(12): error: identifier "x" is undefined\n\n1 error detected in the compilation of "/k.cu".', 0),
        ("/usr/bin/ld: cannot find -lcudart_static: No such file or directory\ncollect2: error: ld returned 1 exit status", 0),
        ("a.o: in function `f':\na.cpp:(.text+0x1): undefined reference to `g'\ncollect2: error: ld returned 1", 1),
        ("c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.", 0),
        ("/bin/sh: 1: /opt/nvcc: not found", 0),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'", 0),
        ("Segmentation fault", 0),
    ],
)  # fmt: skip
def test_the_first_error_of_a_build(said: str, expected: int, setup_py: dict[str, Any]) -> None:
    output = f"[1/9] x.o\nFAILED: [code=1] a.o\nc++ -DNAME='error: none' -c a.cpp -o a.o\n{said}\n"
    output += "[2/9] b.o\nninja: build stopped: subcommand failed.\n"
    line = said.splitlines()[expected]
    assert setup_py["first_error"](output) == line
    long = output.replace(line, line + 1000 * "x")
    assert len(setup_py["first_error"](long)) == 300
    assert (
        setup_py["first_error"]("ninja: error: loading 'build.ninja'")
        == "ninja: error: loading 'build.ninja'"
    )
    assert setup_py["first_error"]("") == "it printed nothing"


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("", "sm_80,sm_90a,sm_100,compute_100"),
        ("sm_100;sm_80", "sm_100,sm_80,compute_100"),
        ("sm_90a", "sm_90a"),
        ("sm_86 sm_999", "sm_86,compute_86"),
    ],
)
def test_ptx_of_the_newest_architecture_is_part_of_the_binary(
    wanted: str, expected: str, setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs newer than any that was compiled for run PTX, and the binary says that it holds it."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_80 sm_86 sm_90 sm_100\nexit 0\n")
    nvcc.chmod(0o755)
    for name, value in {"CUDA_HOME": str(tmp_path), "NVAE_FAST_FORCE_CUDA": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NVAE_FAST_NO_CUDA", raising=False)
    monkeypatch.delenv("NVAE_FAST_CUDA_ARCHS", raising=False)
    if wanted:
        monkeypatch.setenv("NVAE_FAST_CUDA_ARCHS", wanted)
    cuda = setup_py["cuda_toolkit"](True)
    assert ",".join(cuda.archs) == expected
    assert cuda.code()[-2:] == [
        "-gencode",
        f"arch={cuda.archs[-1].replace('sm', 'compute')},code={cuda.archs[-1]}",
    ]


# Sources that every supported PyTorch compiles.


def test_shapes_and_strides_are_not_compared_as_wholes() -> None:
    """PyTorch 2.11 and 2.12 cannot compare the IntHeaderOnlyArrayRef that sizes() and strides() return; 2.13 can."""
    whole = r"\b(?:sizes|strides)\(\)"
    pattern = re.compile(rf"{whole}\s*[=!]=|[=!]=\s*[\w.>()\[\]-]*{whole}|equal\([^;]*{whole}")
    pages = [page for page in (ROOT / "csrc").rglob("*") if page.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(pages) > 60
    found = [
        f"{page.relative_to(ROOT)}:{number}: {line.strip()}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "use same_shape of csrc/checks.h"
    for line in ("a.sizes() == b.sizes()", "if (x != t.strides())", "a[0].sizes()!=b"):
        assert pattern.search(line)
