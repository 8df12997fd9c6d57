"""The shape of the house: imports run one way, and a bare import is light."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import elit

SOURCE = Path(elit.__file__).parent
# A module may import from its own room and from those before it.
ROOMS = (
    *("arguments", "files", "compat", "config", "budgets", "pretrained", "models", "flow", "costs", "data"),
    *("released", "sampling", "training", "elastic"),
    *("evaluate", "planner", "serve", "play", "cli"),
)
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("elit.")}
    return found


@pytest.mark.parametrize("path", [p for p in FILES if room(p) not in ("__init__", "__main__")], ids=str)
def test_imports_run_one_way(path):
    own = ROOMS.index(room(path))
    assert all(ROOMS.index(name) <= own for name in imported_rooms(path))
    if room(path) == "flow":
        assert "models" not in imported_rooms(path)
    if room(path) == "models":
        assert imported_rooms(path) <= {"models", "arguments", "budgets", "files", "compat", "pretrained"}


def test_no_modules_import_each_other():
    """Inside functions neither; raises CycleError, which names them."""
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        graph[name] = {node.module for node in imports} & set(modules)
        graph[name] |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names} & set(modules)
        graph[name] -= {name}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


def test_few_modules_lie_loose():
    assert len(list(SOURCE.glob("*.py"))) <= 8


def test_files_are_put_in_place_in_one_module():
    """And in training/checkpoint.py, whose folders several processes write."""
    writes = re.compile(r"os\.(replace|rename)\(|\.(rename|replace)\((path|target|folder|out)\)|\.tmp\b")
    found = {str(path.relative_to(SOURCE)) for path in FILES if writes.search(path.read_text(encoding="utf-8"))}
    assert found <= {"files.py", "training/checkpoint.py", "training/loop.py"}


def test_private_names_of_other_packages_are_in_compat_alone():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    own = {"_getframe", "_asdict"}  # Python's own
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    foreign = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                names = [] if node.attr in own else [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                names = [part for part in parts if part.startswith("_")]
            else:
                continue
            foreign += [f"{path.relative_to(SOURCE)}:{node.lineno}: {name}" for name in names]
    assert [line for line in foreign if not line.startswith("compat.py")] == []
    assert len(foreign) >= 8  # compat's own are seen, so others would be


def test_no_file_outgrows_one_sitting_and_no_drawers():
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 400 for path in FILES)
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.slow
def test_a_bare_import_is_light_and_every_public_name_is_there():
    """In a fresh process: that of the quickstart from the wheel, in test_recipes.py, asks for every name too."""
    code = "import sys, elit; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(elit, name) for name in elit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = elit.nothing


def test_no_module_shadows_a_public_function():
    names = {path.stem for path in SOURCE.glob("*")}
    assert not names & set(elit.__all__)
