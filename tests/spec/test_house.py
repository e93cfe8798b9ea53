"""The shape of the source: no circle of imports, and nothing that a reader cannot take in at once."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import estimators
import memopt

ROOT = Path(__file__).parents[2]
PACKAGES = ("memopt", "estimators")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(name):
    """The modules that one imports anywhere: on top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{one.name}" for one in node.names}
            found |= {one if one in MODULES else node.module for one in inner}
    return (found & MODULES.keys()) - {name}


def test_no_circle():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 1000
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_a_folder_has_at_most_a_dozen_modules():
    many = {}
    for package in PACKAGES:
        for folder in filter(Path.is_dir, (ROOT / package).rglob("*")):
            files = [path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")]
            modules = [path.name for path in files if path.name != "__init__.py"]
            if len(modules) > 12 and not _one_of_a_kind(folder):
                many[str(folder.relative_to(ROOT))] = sorted(modules)
    assert not many


def _one_of_a_kind(folder):
    """Folders of which every file is the same thing: a rule, a verb."""
    return folder.relative_to(ROOT).as_posix() in ("memopt/rules", "memopt/cli")


#: Where a file is at most 300 lines: what is longer has two ideas.
FOLDERS = ("memopt", "estimators", "tests", "benchmarks", "examples")


def test_a_file_has_at_most_300_lines():
    files = [path for folder in FOLDERS for kind in ("*.py", "*.cpp", "*.h") for path in (ROOT / folder).rglob(kind)]
    assert len(files) > 500
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > 300}


#: Words of our own that gave way to the field's, or had several meanings. CONTRIBUTING.md has the glossary. (The
#: kernels' tables have slots: the place of a moment, as in "slot variables".)
RETIRED = re.compile(
    "homes?|bus|leases?|loans?|keeper|held|aside|bring|expect|survivor|admit|at_step|publish|early|arrivals?|away|noise|"
    "worlds|settled?|kept|known|lanes|finish"
)


def named(tree):
    """Every name that a module gives: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr, node.lineno


def test_no_class_has_the_name_of_another():
    """Nor a named type; a name of the public interface is that of no other function either."""
    found = {}
    public = {*memopt.__all__, *estimators.__all__}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.name in public):
                found.setdefault(node.name, []).append(name)
            elif isinstance(node, ast.Assign) and not _is_type_variable(node.value):
                for target in filter(_names_a_type, node.targets):
                    found.setdefault(target.id, []).append(name)
    assert len(found) > 300
    assert public <= found.keys()
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def _names_a_type(target):
    return isinstance(target, ast.Name) and re.fullmatch("_?[A-Z]+[a-z][A-Za-z0-9]*", target.id)


def _is_type_variable(value):
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "TypeVar"


def test_retired_words_name_nothing():
    found, seen = [], 0
    for name, path in MODULES.items():
        if name.startswith("memopt"):
            for one, line in named(ast.parse(path.read_text())):
                seen += 1
                if RETIRED.fullmatch(one.strip("_").lower()) or one == "Slot":
                    found.append(f"{name}:{line} {one}")
    assert not found
    assert seen > 10_000
