"""The layout of the package: which module may import which, and what modules are called."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvae_fast as nf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "nvae_fast"
KERNELS = f"{PACKAGE}.kernels"  # a link to kernels/, imported by ops where Triton is
# A module imports from its own part of the package, from parts with a lower number, and from BESIDE.
LAYERS = {"ops": 0, "nn": 1, "distributions": 1, "models": 2, "patching": 3, "training": 3, "cli": 4}
# These import nothing but one another.
BESIDE = {"data", "distributed", "io", "version"}


def modules(root: Path = ROOT / PACKAGE) -> dict[str, Path]:
    """{dotted name: file} of every module, kernels aside."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "kernels":
            found[".".join((PACKAGE, *(part for part in parts if part != "__init__")))] = path
    return found


def statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module, those inside functions too; not those that only a type checker follows."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse)
        else:
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.ExceptHandler | ast.match_case):
                    yield from statements(part.body)
                elif isinstance(part, ast.stmt):
                    yield from statements([part])


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            source = _source(node, name, path)
            inner = [f"{source}.{alias.name}" for alias in node.names]
            targets = [whole if whole in known else source for whole in inner]
        found |= {target for target in targets if target in known}
    return found - {name}


def _source(node: ast.ImportFrom, name: str, path: Path) -> str:
    """What ``node``, in the module ``name``, imports from, as an absolute name."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    return ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle for each import that closes one, found depth first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def against_the_direction(graph: dict[str, set[str]]) -> list[str]:
    """A line for each import that points from a lower part of the package to a higher one."""
    lines = []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            part, other = (n.split(".")[1] if "." in n else "" for n in (name, target))
            if not part or name == f"{PACKAGE}.__main__" or part == other or other in BESIDE:
                continue
            if part in BESIDE or not other or LAYERS.get(other, 9) >= LAYERS.get(part, -1):
                lines.append(f"{name} imports {target}")
    return lines


def shadowed(known: dict[str, Path]) -> list[str]:
    """The modules that ``package.name`` does not reach, because the package's ``__init__`` binds the name otherwise."""
    found = set()
    for package, path in known.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.name == "__init__.py" else ():
            bound: dict[str, str] = {}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound = {node.name: ""}
            elif isinstance(node, ast.Assign):
                bound = {target.id: "" for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                source = _source(node, package, path)
                bound = {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
            found |= {f"{package}.{name}" for name, value in bound.items() if value != f"{package}.{name}"}
    return sorted(found & set(known))


KNOWN = modules()
GRAPH = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def test_no_import_circles() -> None:
    assert [" -> ".join(circle) for circle in circles(GRAPH)] == []


def test_imports_point_one_way() -> None:
    assert against_the_direction(GRAPH) == []


def test_underscores_are_inside_ops_alone() -> None:
    private = [
        name
        for name in KNOWN
        if any(part.startswith("_") and part != "__main__" for part in name.split("."))
        and not name.startswith(f"{PACKAGE}.ops.")
    ]
    assert private == []


def test_no_module_is_shadowed() -> None:
    assert shadowed(KNOWN) == []


@pytest.mark.parametrize("package", [name for name, path in KNOWN.items() if path.name == "__init__.py"])
def test_packages_hold_names_and_nothing_else(package: str) -> None:
    body = ast.parse(KNOWN[package].read_text(encoding="utf-8")).body
    imported = {
        alias.asname or alias.name
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (listed,) = [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)] or [[]]
    assert isinstance(body[0], ast.Expr), "the first statement must be a docstring"
    assert {type(node) for node in body[1:]} <= {ast.ImportFrom, ast.Assign}
    assert sorted(listed) == sorted(imported)


def test_public_functions_are_no_modules() -> None:
    public = {name for name in nf.__all__ if inspect.ismodule(getattr(nf, name))}
    assert public == {"data", "distributions", "nn", "training"}
    assert not [name for name in nf.training.__all__ if inspect.ismodule(getattr(nf.training, name))]


def graph_of(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    known = write(root, files)
    return {name: imports(name, path, known) for name, path in known.items()}


def write(root: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return modules(root)


@pytest.mark.parametrize(
    "text",
    [
        "import nvae_fast.b\n",
        "from nvae_fast.b import x\n",
        "from nvae_fast import b\n",
        "from . import b\n",
        "from .b import x\n",
        "def f():\n    from nvae_fast import b\n",
        "try:\n    pass\nexcept OSError:\n    import nvae_fast.b\n",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import nvae_fast.b\n",
    ],
)
def test_a_circle_is_found(tmp_path: Path, text: str) -> None:
    graph = graph_of(tmp_path, {"__init__": "", "a": text, "b": "from nvae_fast.a import y\n"})
    assert circles(graph) == [["nvae_fast.a", "nvae_fast.b", "nvae_fast.a"]]


def test_imports_for_type_checkers_make_no_circle(tmp_path: Path) -> None:
    text = "if TYPE_CHECKING:\n    import nvae_fast.b\n"
    assert circles(graph_of(tmp_path, {"a": text, "b": "import nvae_fast.a\n"})) == []


def test_wrong_directions_are_found(tmp_path: Path) -> None:
    files = {
        "__init__": "",
        "ops/a": "from nvae_fast.nn.b import x\n",
        "nn/b": "import nvae_fast.ops.a\nimport nvae_fast.distributions.d\n",
        "distributions/d": "import nvae_fast.ops.a\n",
        "data/c": "from nvae_fast.ops.a import x\n",
        "cli/d": "import nvae_fast\nimport nvae_fast.data.c\n",
    }
    assert against_the_direction(graph_of(tmp_path, files)) == [
        "nvae_fast.cli.d imports nvae_fast",
        "nvae_fast.data.c imports nvae_fast.ops.a",
        "nvae_fast.nn.b imports nvae_fast.distributions.d",
        "nvae_fast.ops.a imports nvae_fast.nn.b",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from nvae_fast.x.work import work\n",
        "from .work import work\n",
        "def work(): ...\n",
        "work = None\n",
        "from nvae_fast.x.other import y as work\n",
    ],
)
def test_shadows_are_found(tmp_path: Path, text: str) -> None:
    assert shadowed(write(tmp_path, {"x/__init__": text, "x/work": "", "x/other": ""})) == [
        "nvae_fast.x.work"
    ]


@pytest.mark.parametrize("text", ["from nvae_fast.x import work\n", "from . import work\n"])
def test_a_package_may_import_its_modules(tmp_path: Path, text: str) -> None:
    assert shadowed(write(tmp_path, {"x/__init__": text, "x/work": ""})) == []


# Tests of private modules, and of what has no other handle. All others import them from tests/internals.py.
OF_PRIVATE_MODULES = {
    "internals", "test_build", "test_capture", "test_depthwise_conv2d_cuda", "test_devices", "test_extension",
    "test_operator_fuzz", "test_packaging", "test_registration", "test_regularization", "test_step", "test_torchrun",
}  # fmt: skip


def private_imports(path: Path) -> list[str]:
    """The private names of the package that a file imports."""
    return [
        f"{path.name}: {node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for alias in node.names
        if any(part.startswith("_") for part in (*(node.module or "").split("."), alias.name))
    ]


def test_few_tests_import_private_names() -> None:
    found = {path.stem: private_imports(path) for path in (ROOT / "tests").glob("*.py")}
    assert not [line for name, lines in found.items() if name not in OF_PRIVATE_MODULES for line in lines]
