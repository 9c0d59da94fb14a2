"""A binary is loaded only by the Python code it was made for, and what an installation lacks is said once and clearly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvae_fast.ops import _backend, _devices, _extension, _schemas

ROOT = Path(__file__).resolve().parent.parent
# An editable install of this repository would lend its extension to a copy of the package.
_ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"


def python(code: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _ALONE + code],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, its binary included."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "_build.json")
    shutil.copytree(ROOT / "nvae_fast", copy / "nvae_fast", ignore=ignored)
    return copy


# ------------------------------------------------------------------------------ the schemas


_FINGERPRINT = "from nvae_fast.ops import _schemas; print(_schemas.fingerprint())"


def fingerprint(package: Path) -> str:
    done = python(_FINGERPRINT, package, NVAE_FAST_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_operator_of_the_dispatcher_is_in_the_fingerprint() -> None:
    """With the schema that define_op inferred."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nvae_fast::")]
    assert len(names) > 30
    assert {name.removeprefix("nvae_fast::") for name in names} == set(_schemas.SCHEMAS)
    for name, schema in _schemas.SCHEMAS.items():
        registered = str(getattr(torch.ops.nvae_fast, name).default._schema).removeprefix("nvae_fast::")
        assert registered == str(torch._C.parse_schema(name + schema))


def test_the_fingerprint_follows_schemas_and_version_and_nothing_else(package: Path) -> None:
    before = fingerprint(package)
    assert before == _schemas.fingerprint()
    assert len(before) == 16
    page = package / "nvae_fast" / "ops" / "channel_statistics.py"
    text = page.read_text()
    page.write_text(
        text.replace("mean, m2 = _op(x, per_sample)", "mean, m2 = _op(x, bool(per_sample))") + "\n# More.\n"
    )
    assert fingerprint(package) == before
    other = text.replace(
        "def _reference(x: Tensor, per_sample: bool)",
        "def _reference(x: Tensor, per_sample: int)",
    )
    assert other != text
    page.write_text(other)
    assert fingerprint(package) != before
    page.write_text(text)
    version = package / "nvae_fast" / "version.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "9'))
    assert fingerprint(package) != before


def test_setup_takes_the_same_fingerprint() -> None:
    """Without the package's own imports, which may miss something while it is being installed."""
    source = (ROOT / "setup.py").read_text()
    (code,) = re.findall(r'FINGERPRINT = """(.*?)"""', source, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['numpy'] = None\n" + code, str(ROOT / "nvae_fast")],
        env={**os.environ, "NVAE_FAST_DISABLE_EXTENSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"fingerprint {_schemas.fingerprint()}" in done.stdout.splitlines(), done.stderr


def test_the_binary_says_what_it_was_built_for(tmp_path: Path) -> None:
    if not _extension.load():
        pytest.skip(_extension.reason())
    info = _extension.info()
    assert info["schemas"] == _schemas.fingerprint() == _schemas.compiled_into(info["path"])
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF" + bytes(64))
    assert _schemas.compiled_into(other) is None


_USE = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, nvae_fast as nf
    from nvae_fast.ops import _extension
    statistics = torch.ops.nvae_fast.channel_statistics
    nf.residual_normal(torch.zeros(1, 4, 2, 2), seed=3)
print(_extension.load())
print(len(seen), *[w.message for w in seen])
print(nf.backends()["residual_normal"]["cpu"])
"""


def test_a_binary_of_other_sources_is_refused(package: Path) -> None:
    if not _extension.load():
        pytest.skip(_extension.reason())
    whole = python(_USE, package)
    assert whole.stdout.splitlines() == ["True", "0", "cpp"], whole.stderr

    def refused() -> None:
        done = python(_USE, package)
        assert done.returncode == 0, done.stderr
        loaded, warned, backend = done.stdout.splitlines()
        assert loaded == "False"
        assert warned.startswith("1 nvae_fast: the C++ extension was built from other sources")
        assert "rebuild it: `python setup.py build_ext --inplace`" in warned
        assert "Lost without it" in warned
        assert backend.startswith("reference (the C++ extension was built from other sources")

    page = package / "nvae_fast" / "ops" / "channel_statistics.py"
    text = page.read_text()
    page.write_text(text.replace("per_sample: bool) -> tuple[", "per_sample: bool, more: int = 0) -> tuple["))
    assert page.read_text() != text
    refused()
    page.write_text(text)
    (binary,) = (package / "nvae_fast").glob("_C*.so")
    binary.write_bytes(binary.read_bytes().replace(b"nvae_fast schemas ", b"nvae_fast seasons "))
    refused()


# -------------------------------------------------------------------------------- what is missing


def test_without_the_binary(package: Path) -> None:
    for binary in (package / "nvae_fast").glob("_C*"):
        binary.unlink()
    done = python(_USE, package)
    loaded, warned, backend = done.stdout.splitlines()
    assert loaded == "False"
    assert warned.startswith(
        "1 nvae_fast: the C++ extension is not built; run `python setup.py build_ext --inplace`"
    )
    assert "Every operation on the CPU, and depthwise_conv2d on the GPU, runs in plain PyTorch" in warned
    assert backend.startswith("reference (the C++ extension is not built")
    # Who asked for it is not told again.
    for name, value in {"NVAE_FAST_DISABLE_EXTENSION": "1", "NVAE_FAST_BACKEND": "reference"}.items():
        assert python(_USE, package, **{name: value}).stdout.splitlines()[1] == "0"


_NO_TRITON = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import torch, nvae_fast as nf
from nvae_fast import cli
nf.residual_normal(torch.zeros(1, 4, 2, 2), seed=3)
model = nf.nn.BatchNormSwish(3)
model(torch.randn(2, 3, 4, 4)).sum().backward()
rows = nf.backends()
assert all(row["cuda"].startswith("reference (") for name, row in rows.items() if name != "depthwise_conv2d"), rows
print(rows["residual_normal"]["cuda"])
assert cli.main(["info"]) == 0
"""


def test_without_triton() -> None:
    done = python(_NO_TRITON, ROOT)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "reference (triton is not installed: pip install 'triton>=3.6')"
    (line,) = [line for line in rest if "Lost without it: the Triton kernels" in line]
    assert "missing" in rest
    assert line.startswith("  triton")
    assert "Nothing on the CPU" in line


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["CPU PyTorch", "CUDA PyTorch"])
def test_a_complete_installation_misses_nothing(cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_extension, "load", lambda: True)
    monkeypatch.setattr(_extension, "cuda_archs", lambda: ["sm_80"])
    monkeypatch.setattr(_backend, "triton_reason", lambda: None)
    monkeypatch.setattr(_devices, "visible", list)
    assert _backend.missing() == {}
    monkeypatch.setattr(_extension, "cuda_archs", list)
    assert list(_backend.missing()) == (["csrc/cuda"] if cuda else [])
