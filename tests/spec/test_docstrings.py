"""Whoever asks ``help()`` or an editor is told of every parameter of everything public, of errors, and shown a use."""

import inspect
import re

import pytest

import estimators
import memopt

PLAIN = {f"memopt.{name}": getattr(memopt, name) for name in memopt.__all__}
PLAIN["estimators.estimate"] = estimators.estimate
CLASSES = {name: found for name, found in PLAIN.items() if inspect.isclass(found) and not issubclass(found, Exception)}


def methods(kind):
    """Those that a class of ours defines, in it or in a class before it."""
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] == "memopt":
            for name, member in vars(one).items():
                function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if inspect.isfunction(function) and not name.startswith("_"):
                    yield name, function


FUNCTIONS = {name: found for name, found in PLAIN.items() if inspect.isfunction(found)}
METHODS = {f"{name}.{m}": function for name, kind in CLASSES.items() for m, function in methods(kind)}


def documented(doc):
    """Names under ``Args:``, of which one line may say several."""
    args = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    lines = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", args[1], re.M) if args else []
    return {name.strip("* ") for line in lines for name in line.split(",")}


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_every_parameter_is_documented(name):
    function = (FUNCTIONS | METHODS)[name]
    takes = [p for p in inspect.signature(function).parameters if p != "self"]
    doc = inspect.getdoc(function) or ""
    assert doc, f"{name} has no docstring"
    missing = set(takes) - documented(doc)
    assert not missing, f"{name} says nothing under Args of {sorted(missing)}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_shows_a_use_and_what_it_returns_or_raises(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    assert ">>>" in doc or "Example" in doc
    assert "Raises:" in doc


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_a_use(name):
    assert ">>>" in inspect.getdoc(CLASSES[name])
