"""Builds and tests the package on every supported Python and PyTorch: `make matrix`. Not part of continuous integration.

The first cell, of the oldest Python and PyTorch, builds a wheel. Every cell installs that one wheel into a virtual environment
of its own and runs the essential tests with the binary in it: one binary for many versions. Each further PyTorch compiles once
the sources that include its headers. No GPU is needed, and the CUDA sources are left out: what the binary asks of PyTorch and
Python is the same without them, and `make gpu-dry` builds them.

    python tests/matrix.py                        all cells: takes gigabytes and about an hour on two cores
    python tests/matrix.py --cells 3.13x2.13      some of them; what others said before is kept
    python tests/matrix.py --wheel FILE --no-sources

Results go to docs/support.json, and as a table into docs/install.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
JSON, PAGE = ROOT / "docs" / "support.json", ROOT / "docs" / "install.md"
CELLS = "3.10x2.11 3.12x2.12 3.11x2.13 3.13x2.13"
TOOLS = ["numpy", "setuptools", "wheel", "ninja", "packaging", "pytest", "pillow", "scikit-learn"]
SPACE = 15e9  # bytes: an environment with a CUDA PyTorch takes 5, and the downloads as much
# What depends on versions: loading and dispatch, torch.compile, autograd, autocast, Triton, a whole training step. What takes
# the compiler of a GPU asks nothing of Python or PyTorch.
TESTS = (
    "test_extension", "test_registration", "test_devices", "test_ops", "test_residual_normal", "test_depthwise_conv2d",
    "test_inverted_residual", "test_weight_norm", "test_nn", "test_step", "test_sampler",
)  # fmt: skip
INTERPRETED = ("triton/test_weight_norm",)  # a run of their own
MARKS = "<!-- written by tests/matrix.py -->", "<!-- end -->"


class Cell(NamedTuple):
    python: str
    torch: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        found = re.fullmatch(r"(\d+\.\d+)x(\d+\.\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"expected Python and PyTorch as 3.12x2.11, got {text!r}")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"Python {self.python}, PyTorch {self.torch}"


class Run(NamedTuple):
    output: str
    seconds: float
    cpu: float
    ok: bool


def run(command: list[Any], cwd: Path, check: bool = True, **environment: str) -> Run:
    """Run to the end, with a clean environment and one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NVAE_FAST_") and k != "PYTHONPATH"}
    no_cuda = os.environ.get("NVAE_FAST_NO_CUDA", "1")
    env = {**kept, "OMP_NUM_THREADS": "1", "NVAE_FAST_NO_CUDA": no_cuda, **environment}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if check and done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nfailed: {' '.join(map(str, command))}")
    return Run(done.stdout, time.monotonic() - start, cpu, done.returncode == 0)


class Environment:
    """A virtual environment with one Python and one PyTorch."""

    def __init__(self, cell: Cell) -> None:
        self.folder = BUILD / f"python{cell.python}-torch{cell.torch}"
        self.python = self.folder / "bin" / "python"
        if not (self.folder / ".installed").exists():
            interpreter = shutil.which(f"python{cell.python}")
            if interpreter is None:
                raise SystemExit(f"python{cell.python} is not on PATH")
            if shutil.disk_usage(BUILD).free < SPACE:
                raise SystemExit(f"less than {SPACE / 1e9:.0f} GB are free for {self.folder}")
            run([interpreter, "-m", "venv", "--clear", self.folder], BUILD)
            self.pip("install", f"torch=={cell.torch}.*", *TOOLS)
            (self.folder / ".installed").touch()

    def pip(self, *arguments: Any, **environment: str) -> Run:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return run(command, BUILD, **environment)


def sources(target: Path) -> Path:
    """A copy of the files under version control, in which to build and test."""
    shutil.rmtree(target, ignore_errors=True)
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in listed.output.splitlines():
        source = ROOT / name
        if source.exists() or source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def build_wheel(environment: Environment) -> tuple[Path, Run]:
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    tree = sources(BUILD / "wheel-sources")
    command = ["wheel", "--no-build-isolation", "--no-deps", "-w", folder, tree]
    done = environment.pip(*command, NVAE_FAST_REQUIRE_EXTENSION="1")
    (wheel,) = folder.glob("*.whl")
    return wheel, done


# Kernels (*.vec.cpp) include no header of PyTorch and take most of the time: once the wheel is built, its objects stand in for
# them, and only what depends on PyTorch is compiled.
COMPILER = """#!/bin/sh
last= kernel= out=
for word; do
  case $word in *.vec.cpp) kernel=1;; esac
  [ "$last" = -o ] && out=$word
  [ "$last" = -MF ] && depends=$word
  last=$word
done
[ "$kernel" ] || exec {compiler} "$@"
echo "$out:" > "$depends"
exec cp "{objects}/$out" "$out"
"""


def build_sources(environment: Environment) -> Run:
    """Compile for the PyTorch of this environment, and load what was built."""
    tree = sources(environment.folder / "sources")
    settings = {}
    if found := list((BUILD / "wheel-sources").glob("build/temp*")):
        wrapper = environment.folder / "compiler"
        compiler = os.environ.get("CXX", "c++")
        wrapper.write_text(COMPILER.format(compiler=compiler, objects=found[0]), encoding="utf-8")
        wrapper.chmod(0o755)
        settings["CXX"] = str(wrapper)
    done = run(
        [environment.python, "setup.py", "-q", "build_ext", "--inplace"], tree, check=False, **settings
    )
    if done.ok:
        facts(environment, tree)
    return done


def facts(environment: Environment, where: Path) -> dict[str, Any]:
    """What `info` says of the package that is found from ``where``."""
    done = run([environment.python, "-m", "nvae_fast", "info", "--json"], where)
    report: dict[str, Any] = json.loads(done.output[done.output.index("{\n") :])
    if not report["extension"]["loaded"]:
        raise SystemExit(f"the extension does not load: {report['extension']['reason']}")
    return report


def test(environment: Environment, wheel: Path) -> dict[str, Any]:
    """Install the wheel, and run the tests with the binary that was installed."""
    environment.pip("install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    report = facts(environment, environment.folder)
    binary = Path(report["extension"]["path"])
    if environment.folder not in binary.parents:
        raise SystemExit(f"{binary} is not what was installed into {environment.folder}")
    tree = sources(environment.folder / "tests-run")
    shutil.copy2(binary, tree / "nvae_fast")
    options = ["-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    done = [
        run(
            [environment.python, "-m", "pytest", *options, *(f"tests/{name}.py" for name in names)],
            tree, check=False, PYTHONPATH=str(tree),
        )
        for names in (TESTS, INTERPRETED)
    ]  # fmt: skip
    output = "\n".join(part.output for part in done)
    log = BUILD / f"{environment.folder.name}.log"
    log.write_text(output, encoding="utf-8")
    passed = all(part.ok for part in done)
    if not passed:
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        print("\n".join([*failed, f"all of it: {log}"]), file=sys.stderr)
    counts: Counter[str] = Counter()
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output):
        counts[word] += int(number)
    versions = {name: report["versions"][name] for name in ("python", "torch", "cuda", "triton", "numpy")}
    return {
        "versions": versions,
        "wheel": wheel.name,
        "tests": dict(counts),
        "seconds": round(sum(part.seconds for part in done)),
        "passed": passed,
    }


def machine() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {found[1].strip() if found else 'an unnamed CPU'}, no GPU used"


def table(document: dict[str, Any]) -> str:
    """The cells in Markdown."""
    lines = [
        "| Python | PyTorch | its CUDA | Triton | NumPy | Extension compiled here | Tests with the one wheel |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sorted(
        document["cells"], key=lambda name: [list(map(int, v.split("."))) for v in name.split("x")]
    ):
        cell = document["cells"][name]
        v, counts = cell["versions"], cell["tests"]
        built = {None: "", True: "yes", False: "**failed**"}[cell["built"]]
        if cell["built"]:
            built += f", {cell['build_cpu_seconds'] / 60:.1f} CPU minutes"
        said = ", ".join(
            f"{counts[word]} {word}" for word in ("passed", "failed", "errors", "skipped") if counts.get(word)
        )
        cuda = v["cuda"] if v["cuda"][0].isdigit() else "none"
        row = [
            v["python"],
            v["torch"],
            cuda,
            v["triton"],
            v["numpy"],
            built,
            said if cell["passed"] else f"**{said}**",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def write(cell: Cell, result: dict[str, Any], **head: str) -> None:
    """Put one cell beside what is known of the others."""
    document: dict[str, Any] = {"cells": {}}
    if JSON.exists():
        document = json.loads(JSON.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    document |= {"machine": machine(), "date": today, **head}
    name = f"{cell.python}x{cell.torch}"
    if result["built"] is None and name in document["cells"]:  # what an earlier run compiled still holds
        before = document["cells"][name]
        result |= {key: before[key] for key in ("built", "build_cpu_seconds") if key in before}
    document["cells"][name] = result
    JSON.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    said = f"On {document['machine']}, {document['date']}"
    if "wheel_built_with" in document:
        said += f"; the wheel was built with {document['wheel_built_with']}"
    PAGE.write_text(f"{page[:start]}\n\n{said}.\n\n{table(document)}\n\n{page[end:]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Cell.parse, nargs="+", default=[Cell.parse(c) for c in CELLS.split()])
    parser.add_argument("--wheel", type=Path, help="one that is built already")
    parser.add_argument("--no-sources", action="store_true", help="compile nothing but the wheel")
    parser.add_argument("--keep", action="store_true", help="leave the environments, 5 GB each")
    options = parser.parse_args(arguments)
    BUILD.mkdir(parents=True, exist_ok=True)
    wheel = options.wheel and options.wheel.resolve()
    compiled: set[str] = set()
    head: dict[str, str] = {}
    passed = True
    for cell in options.cells:
        print(f"{cell}: installing", flush=True)
        environment = Environment(cell)
        result: dict[str, Any] = {"built": None}
        built = None
        if wheel is None:
            print(f"{cell}: building the wheel", flush=True)
            wheel, built = build_wheel(environment)
            head["wheel_built_with"] = str(cell)
        elif cell.torch not in compiled and not options.no_sources:
            print(f"{cell}: compiling the sources", flush=True)
            built = build_sources(environment)
            if not built.ok:
                print(built.output[-4000:], file=sys.stderr)
        if built is not None:
            compiled.add(cell.torch)
            result |= {"built": built.ok, "build_cpu_seconds": round(built.cpu)}
        print(f"{cell}: testing {wheel.name}", flush=True)
        result |= test(environment, wheel)
        print(f"{cell}: {result['tests']} in {result['seconds']} s", flush=True)
        write(cell, result, **head)
        passed = passed and result["passed"] and result["built"] is not False
        if not options.keep:
            shutil.rmtree(environment.folder)
    print(table(json.loads(JSON.read_text(encoding="utf-8"))))
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
