"""What people install: the sdist, the wheels made from it, with and without a compiler, on every Python supported.

Nothing is compiled here: a stand-in for the compiler hands setup.py the extension that is built already.
"""

from __future__ import annotations

import ast
import email.message
import email.parser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvae_fast as nf
from nvae_fast.ops import _extension

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PACKAGE = sorted(
    f"nvae_fast/{path.relative_to(ROOT / 'nvae_fast').as_posix()}"
    for path in (ROOT / "nvae_fast").rglob("*.py")
)
PACKAGE += [f"nvae_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
PACKAGE = sorted(set(PACKAGE))


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NVAE_FAST_") and name != "CXX"
    }
    env = {**kept, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def hook(name: str, source: Path, target: Path, **environment: str) -> Path:
    """One of the hooks that pip and ``python -m build`` call, in the environment at hand."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print('made', backend.{name}(sys.argv[1]))"
    done = run([sys.executable, "-c", code, str(target)], source, **environment)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1].removeprefix("made ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def without_compilers(folder: Path) -> str:
    """A PATH with nothing on it but ninja, should setup.py come so far."""
    bin = folder / "bin"
    bin.mkdir()
    if ninja := shutil.which("ninja"):
        (bin / "ninja").symlink_to(ninja)
    return str(bin)


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    """The sdist of a copy of this tree, in which the building leaves its traces."""
    copy = folder / "tree"
    ignored = shutil.ignore_patterns(
        "*.so", "__pycache__", "_build.json", ".*", "build", "dist", "runs", "*.egg-info", "shared"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / ".clang-format", copy)
    return hook("build_sdist", copy, folder / "sdist")


@pytest.fixture(scope="module")
def unpacked(folder: Path, sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked")
    (found,) = (folder / "unpacked").iterdir()
    return found


@pytest.fixture(scope="module")
def pure(folder: Path, unpacked: Path, without_compilers: str) -> Path:
    return hook("build_wheel", unpacked, folder / "pure", NVAE_FAST_NO_EXTENSION="1", PATH=without_compilers)


@pytest.fixture(scope="module")
def fallback(folder: Path, unpacked: Path, without_compilers: str) -> Path:
    return hook("build_wheel", unpacked, folder / "fallback", PATH=without_compilers)


@pytest.fixture(scope="module")
def native(folder: Path, unpacked: Path) -> Path:
    if not _extension.load():
        pytest.skip(_extension.reason())
    compiler = folder / "compiler"
    compiler.write_text(
        '#!/bin/sh\nlinks=\nfor word; do\n  [ "$last" = -o ] && out=$word\n  [ "$last" = -MF ] && echo "$out:" > "$word"\n'
        f'  [ "$word" = -shared ] && links=1\n  last=$word\ndone\n[ "$links" ] && exec cp {_extension.info()["path"]} "$out"\n'
        ': > "$out"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    settings = dict(CXX=str(compiler), NVAE_FAST_NO_CUDA="1", NVAE_FAST_REQUIRE_EXTENSION="1")
    return hook("build_wheel", unpacked, folder / "native", **settings)


@pytest.fixture(params=["pure", "fallback", "native"])
def wheel(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (found,) = [n for n in archive.namelist() if n == name or n.endswith(f".dist-info/{name}")]
        return archive.read(found).decode()


# --------------------------------------------------------------------------------- contents


def test_the_sdist_holds_what_building_and_testing_need(unpacked: Path) -> None:
    assert unpacked.name == f"nvae_fast-{nf.__version__}"
    wanted = [path.relative_to(ROOT) for part in ("csrc", "kernels") for path in (ROOT / part).rglob("*.*")]
    wanted += [path.relative_to(ROOT) for path in (ROOT / "tests").glob("*.py")]
    wanted += [path.relative_to(ROOT) for path in (ROOT / "tests" / "cuda_shim").glob("*.*")]
    wanted += [path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.py")]
    wanted += map(
        Path,
        (
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "README.md",
            "LICENSE",
            "PKG-INFO",
            "mkdocs.yml",
            "docs/kl.md",
        ),
    )
    wanted += map(Path, PACKAGE)
    wanted = [path for path in wanted if "__pycache__" not in path.parts]
    assert len(wanted) > 200
    missing = [path for path in wanted if not (unpacked / path).is_file()]
    assert not missing
    assert not [
        path for path in unpacked.rglob("*") if path.suffix in (".so", ".o", ".pyc") or path.is_symlink()
    ]


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    found = names(wheel)
    python = [name for name in found if name.endswith(".py")]
    assert sorted(python) == PACKAGE  # kernels/, which is a link in the sources, as files
    assert "nvae_fast/kernels/residual_normal.py" in python
    assert {"nvae_fast/py.typed", "nvae_fast/patching/measured/intel-xeon-2core.json"} <= set(found)
    top = {name.split("/")[0] for name in found}
    assert top == {"nvae_fast", f"nvae_fast-{nf.__version__}.dist-info"}
    assert not [
        name for name in found if re.search(r"(^|/)tests?/|__pycache__|\.(cpp|cu|cuh|h|o|pyc)$", name)
    ]
    with zipfile.ZipFile(wheel) as archive:  # a link would be stored as one
        assert not [i.filename for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)]


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {nf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def metadata(wheel: Path) -> email.message.Message:
    return email.parser.Parser().parsestr(read(wheel, "METADATA"))


def test_a_wheel_says_what_it_is(wheel: Path) -> None:
    facts = metadata(wheel)
    assert (facts["Name"].replace("-", "_"), facts["Version"]) == ("nvae_fast", nf.__version__)
    assert (facts["License-Expression"] or facts["License"]) == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.10"
    hard = [need for need in facts.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(re.split(r"[^\w-]", need)[0] for need in hard) == ["numpy", "torch"]
    classifiers = facts.get_all("Classifier")
    assert [f"Programming Language :: Python :: {version}" in classifiers for version in PYTHONS] == [
        True
    ] * 4
    assert any(name.endswith("LICENSE") and ".dist-info/" in name for name in names(wheel))
    assert "nvae_fast = nvae_fast.cli:main" in read(wheel, "entry_points.txt")
    assert facts.get_payload().startswith("# nvae_fast")


def test_tags_and_binaries(pure: Path, fallback: Path, native: Path) -> None:
    assert pure.name.endswith("-py3-none-any.whl")
    for wheel in (fallback, native):
        assert re.search(r"-cp310-abi3-(linux|macosx)_\w+\.whl$", wheel.name), wheel.name
    for wheel in (pure, fallback):
        assert not [name for name in names(wheel) if name.endswith((".so", ".pyd"))]
    assert [name for name in names(native) if name.endswith(".so")] == ["nvae_fast/_C.abi3.so"]
    assert "nvae_fast/_build.json" not in names(native)
    assert json.loads(read(pure, "nvae_fast/_build.json"))["reason"].endswith("NVAE_FAST_NO_EXTENSION")
    assert json.loads(read(fallback, "nvae_fast/_build.json"))["reason"].startswith("no C++ compiler")


# ------------------------------------------------------------------------------- installed


_USE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]
import torch, nvae_fast as nf
from nvae_fast import cli
from nvae_fast.kernels import __path__ as kernels
out = nf.residual_normal(torch.ones(1, 4, 2, 2, requires_grad=True), seed=3)
(out.z.sum() + out.kl.sum()).backward(); out = out._replace(kl=out.kl.detach())
model = nf.NVAE(nf.NVAEConfig(num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_preprocess_cells=1,
                              num_postprocess_cells=1, num_latent_per_group=2))
model(torch.rand(2, 1, 32, 32), seed=1).kl.sum().backward()
print(nf.__file__); print(list(kernels)[0]); print(nf.__version__); print(nf.backends()["residual_normal"]["cpu"])
print(out.kl.sum().item())
cli.main(["info"])
"""


def test_a_wheel_installs_and_works(wheel: Path, tmp_path: Path, without_compilers: str) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    done = run([*pip, "--target", str(target), str(wheel)], elsewhere)
    assert done.returncode == 0, done.stderr
    done = run([sys.executable, "-c", _USE], elsewhere, PYTHONPATH=str(target), PATH=without_compilers)
    assert done.returncode == 0, done.stderr
    where, kernels, version, backend, kl, *info = done.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert Path(kernels).is_relative_to(target)
    assert version == nf.__version__
    import torch

    expected = nf.residual_normal(torch.ones(1, 4, 2, 2), seed=3).kl.sum()
    assert float(kl) == pytest.approx(float(expected), rel=1e-5)
    if wheel.parent.name == "native":
        assert backend == "cpp"
        assert not done.stderr
        return
    reason = {
        "pure": "the C++ extension was not built: it was left out with NVAE_FAST_NO_EXTENSION",
        "fallback": "the C++ extension was not built: no C++ compiler was found (c++, g++, clang++)",
    }[wheel.parent.name]
    assert backend == f"reference ({reason})"
    assert done.stderr.count(reason) == 1
    assert "Lost without it: the C++ kernels" in done.stderr
    assert [line for line in info if line.startswith("  extension") and f"{reason}. Lost without it" in line]


def test_an_editable_install_is_found_beside_a_folder_of_its_name(unpacked: Path, tmp_path: Path) -> None:
    """A working directory that holds a clone has such a folder, which is no package."""
    source, target = tmp_path / "nvae_fast", tmp_path / "site"
    shutil.copytree(unpacked, source)
    made = hook("build_editable", source, tmp_path / "wheel", NVAE_FAST_NO_EXTENSION="1")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(target)
    code = (
        "import os, site, sys; from importlib.util import find_spec\n"
        # The environment of the tests may have an editable install of its own.
        "sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, 'nvae_fast', '__init__.py'))]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        f"site.addsitedir({str(target)!r}); print(find_spec('nvae_fast').origin)"
    )
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH="")
    assert done.stdout.strip() == str(source / "nvae_fast" / "__init__.py"), done.stderr


def test_switches_that_exclude_each_other() -> None:
    settings = dict(NVAE_FAST_NO_EXTENSION="1", NVAE_FAST_REQUIRE_EXTENSION="1")
    done = run([sys.executable, "setup.py", "--version"], ROOT, **settings)
    assert done.returncode != 0
    assert "NVAE_FAST_NO_EXTENSION and NVAE_FAST_REQUIRE_EXTENSION exclude each other" in done.stderr


# -------------------------------------------------------------------------------- every Python


def files() -> Iterator[Path]:
    for part in ("nvae_fast", "kernels", "tests", "benchmarks", "docs", "examples"):
        yield from sorted((ROOT / part).rglob("*.py"))
    yield ROOT / "setup.py"


def test_every_file_is_python_3_10() -> None:
    checked = [ast.parse(path.read_bytes(), str(path), feature_version=(3, 10)) for path in files()]
    assert len(checked) > 150
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* OSError:\n    pass\n", feature_version=(3, 10))


def test_the_tools_hold_the_oldest_python() -> None:
    """ruff and mypy then refuse what 3.10 does not have, in `make lint`."""
    text = (ROOT / "pyproject.toml").read_text()
    for line in ('requires-python = ">=3.10"', 'target-version = "py310"', 'python_version = "3.10"'):
        assert line in text.splitlines()
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text) == PYTHONS
