"""A value on an axis is one file and one entry: a package of its own adds one of each, and keeps the contracts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.core import registry
from tests import toys

ROOT = Path(__file__).parents[2]
#: Exact ledger, falling loss, NaN policy, bit-exact resume, low-precision weights, released gradients.
CONTRACTS = (
    "spec/test_ledger.py",
    "training/test_optimizer.py",
    "checkpoint/test_resume.py",
    "formats/test_masters.py",
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """What the contracts say of a package that is found where any package is."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toys").symlink_to(ROOT / "tests" / "toys")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    files = [f"tests/{name}" for name in CONTRACTS]
    options = ["-p", "toys", "-p", "no:cacheprovider", "-vv", "--tb=short", "-m", "not slow", "-k", "not thousandth"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MEMOPT_TOYS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return re.findall(r"^(\S+::\S+).* PASSED", done.stdout, re.M)


@pytest.mark.parametrize("kind", toys.VALUES)
def test_a_value_of_another_package_keeps_the_contracts(passed, kind):
    name = toys.VALUES[kind][0]
    assert any(name in case for case in passed), passed


def test_the_page_on_extending_works_as_it_stands(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S)
    (tmp_path / "mine.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()][-1] == "lion-halves@elsewhere"


def test_the_calculator_prices_a_partition_of_another_package():
    code = """
from estimators import estimate
from memopt.core.registry import register
register("partition", "toyrows", "tests.toys.partition:Rows")
toy, own = (estimate("8B", spec, world_size=4, seq=0).peak.nbytes for spec in ("adamw/toyrows", "adamw"))
assert toy == own, (toy, own)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (("rule", "adamw", "a:B"), "'adamw' is taken: it is adamw.RULE of memopt.rules"),
        (("format", "rowmean", "a:B"), "'rowmean' is taken"),
        (("flavour", "sweet", "a:B"), "unknown axis 'flavour'; allowed: rule, format, master"),
        (("rule", "My-Rule", "a:B"), "lower-case letters and digits"),
        (("rule", "8rule", "a:B"), "begins with a letter"),
        (("rule", "mine", "a.B"), "'module:attribute'"),
    ],
)
def test_what_cannot_be_registered_is_one_sentence(wrong, sentence):
    with pytest.raises(ValueError) as error:
        registry.register(*wrong)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_every_place_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in toys.VALUES:
        assert f"| {name} |" in text
    named = set(re.findall(r"`((?:memopt|estimators|tests|benchmarks|kernels)/[\w./]+|[\w]+\.(?:md|toml))`", text))
    for path in named:
        found = ROOT / (f"memopt/{path}" if path.startswith("kernels/") else path)
        if "NAME" not in path and path not in ("keywords.py", "factory.py"):
            assert found.exists(), path
