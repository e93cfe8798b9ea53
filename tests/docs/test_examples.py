"""The notebook: small here, as it stands when slow tests are asked for."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def cells(kind):
    return ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def test_the_notebook_runs(monkeypatch, tmp_path):
    """Every cell, with two steps in place of its own number."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, *others = cells("code")
    few = re.sub(r"^STEPS = \d+", "STEPS = 2", first, flags=re.M)
    assert few != first
    names = {}
    for code in (few, *others):
        exec(compile(code, NOTEBOOK.name, "exec"), names)
    assert set(names["runs"]) == set(names["specs"])


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    nbclient.NotebookClient(
        nbformat.read(NOTEBOOK, 4), timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
