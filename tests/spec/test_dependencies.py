"""What is installed with memopt is what it imports, and what is an extra says so where it is missing."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import estimators
import memopt
from memopt.core import extras

ROOT = Path(memopt.__file__).parent.parent
#: Packages by the name that is imported, where it is not the one that is installed.
NAMES = {"yaml": "pyyaml"}
#: Imported only where something else has brought them: torch brings numpy, typing_extensions and Triton; PyYAML comes
#: with accelerate and transformers, and the sentence without it says how to get it. pynvml is a better source of one
#: figure of a card; without it the card's own is taken.
#: huggingface_hub comes with transformers; a PEFT model is there only where its user has peft.
BROUGHT = {"numpy", "typing_extensions", "triton", "pyyaml", "tensorboard", "pynvml", "huggingface_hub", "peft"}


def declared(name):
    """Packages of ``dependencies`` or of an extra, as pyproject.toml lists them."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^{name} = \[(.*?)\]\s*(?:#.*)?$", text, re.M | re.S)[1]
    return {re.match(r"[a-z_-]+", item)[0] for item in re.findall(r'"([^"]+)"', found)}


def extras_of(name="all"):
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(rf'^{name} = \["memopt\[(.*)\]"\]$', text, re.M)[1].split(",")


def imported():
    """Top-level packages that memopt and estimators import or ask ``require`` for."""
    found = set()
    for package in (memopt, estimators):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module)
                elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "require" and node.args:
                    found.add(ast.literal_eval(node.args[0]))
    tops = {name.partition(".")[0] for name in found}
    return {NAMES.get(t, t) for t in tops if t not in sys.stdlib_module_names | {"memopt", "estimators", "__future__"}}


def test_every_dependency_is_imported_and_everything_imported_is_declared():
    assert declared("dependencies") <= imported()
    optional = set.union(*(declared(extra) for extra in extras_of()))
    assert imported() <= declared("dependencies") | optional | BROUGHT


def test_all_is_what_make_installs_and_what_the_readme_shows_first():
    assert "--editable '.[all,test]'" in (ROOT / "Makefile").read_text()
    assert re.search(r"pip install (.*)", (ROOT / "README.md").read_text())[1].startswith("-e '.[all]'")


W = nn.Parameter(torch.ones(4, 4))


def draw_nothing():
    from memopt.cli.output.charts import save_png

    save_png("x.png", [1.0], {"y": [1.0]}, title="", x_label="", y_label="")


@pytest.mark.parametrize(
    ("missing", "call", "sentence"),
    [
        ("bitsandbytes", lambda: memopt.create([W], "adamw", engine="bitsandbytes"), "engine='bitsandbytes' needs"),
        ("matplotlib", draw_nothing, "a plot needs"),
        ("tensorboard", lambda: memopt.watch(memopt.create([W]), tensorboard="x"), "a log for TensorBoard needs"),
    ],
)
def test_a_missing_extra_is_one_sentence(monkeypatch, missing, call, sentence):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as error:
        call()
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith(f"pip install {missing}")
    assert "\n" not in str(error.value)


def test_an_installation_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"is installed and does not import \(No module named 'no_such_library'\)"):
        extras.require("half_there", "a test")
