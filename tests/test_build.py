"""What is built: one binary for many versions, GPU code for every architecture without spills, and a package
that works when nothing could be built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import aot
import pytest
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


def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "csrc", "kernels", "nvae_fast", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    environment = {"CXX": "no-such-compiler"}
    done = python("setup.py", "-q", "build", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "installing without the C++ extension: no C++ compiler was found (no-such-compiler)" in done.stderr
    (built,) = (tmp_path / "build").glob("lib*")
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
    required = python("setup.py", "-q", "build", cwd=tmp_path, NVAE_FAST_REQUIRE_EXTENSION="1", **environment)
    assert required.returncode != 0
    assert "cannot be built: no C++ compiler" in required.stderr
    asked = python("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, **environment)
    assert asked.returncode != 0
