"""Names with a leading underscore are a module's own: nothing outside reads or writes them."""

import ast
from collections import defaultdict
from pathlib import Path

#: Of NamedTuple, ctypes and torch, whose names they are.
FOREIGN = {"_parameters", "_buffers", "_replace", "_fields", "_asdict", "_fields_", "_make", "_version", "_apply"}
ROOT = Path(__file__).parents[2]
SOURCES = {path: ast.parse(path.read_text()) for top in ("memopt", "estimators") for path in (ROOT / top).rglob("*.py")}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in FOREIGN


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree):
    """Private names that a module gives to something: functions, classes, variables, attributes, slots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


DEFINED = {path: defined(tree) for path, tree in SOURCES.items()}
OWNERS = defaultdict(set)
for _path, _names in DEFINED.items():
    for _name in _names:
        OWNERS[_name].add(_path)


def strangers(path):
    """Uses of private names that another module of ours defines, and this one does not."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if is_self(node.value):
                continue  # inherited names are for subclasses
            if node.attr in OWNERS and node.attr not in DEFINED[path]:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("memopt", "estimators")):
            for name in node.names:
                if is_private(name.name) and not (ROOT / node.module.replace(".", "/") / f"{name.name}.py").exists():
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: imports {name.name}"


def test_private_names_stay_in_their_module():
    assert not [use for path in SOURCES for use in strangers(path)]
