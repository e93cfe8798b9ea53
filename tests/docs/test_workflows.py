"""The files of the public CI: what they run is in the repository, and what they test is what pyproject.toml claims.
actionlint (``nox -s workflows``) knows the rest of their grammar."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path):
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_workflow_may_read_and_runs_what_is_there(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert content[True]  # `on`, to YAML 1.1
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(path):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets
        if words[0].startswith("."):
            assert (ROOT / words[0]).is_file()
    for job in content["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.search(r"@v\d", step.get("uses", "@v1"))


def test_the_matrix_has_the_oldest_and_the_newest():
    pins = [(row["python"], row["torch"]) for row in jobs(FILES[1])["matrix"]["strategy"]["matrix"]["include"]]
    project, constraints = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project)[1], re.search(r'"torch>=([\d.]+)"', project)[1]
    assert (oldest[0], f"{oldest[1]}.0") in pins
    assert re.search(r"^torch==([\d.]+)", constraints, re.M)[1] in {torch for _, torch in pins}
